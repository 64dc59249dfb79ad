"""List files, the check that their images exist, and samples as functions of (seed, epoch, index)."""

import os
import pickle

import cv2
import numpy as np
import pytest

from datasets import landmark, missing
from datasets.batch_memory import BatchMemory, Slot, WorkerMemory
from datasets.images.decode import ImageError
from datasets.landmark import LandmarkDataset, ListError, check_files, read_list
from datasets.transforms import (
    FastTrainTransform,
    TrainTransform,
    draw_train,
    normalise,
    transform_test,
    transform_train,
)
from datasets.transforms import TestTransform as Resized


def write_list(tmp_path, text: str | bytes, name: str = "train_list.txt") -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_images(root, names: list[str], *, size: tuple[int, int] = (40, 50)) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        done, data = cv2.imencode(path.suffix, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        assert done
        path.write_bytes(data.tobytes())


# ------------------------------------------------------------------------------------------------ list files


def test_a_list_is_read(tmp_path):
    text = "a.jpg 0\nb/c d.jpg  12\n\tb/e.jpg\t3\r\n/elsewhere/f.jpg 7\n../g.jpg 1\n  \n\n"
    paths, labels = read_list(write_list(tmp_path, text), root="set", num_classes=13)
    assert paths == ["set/a.jpg", "set/b/c d.jpg", "set/b/e.jpg", "/elsewhere/f.jpg", "set/../g.jpg"]
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 12, 3, 7, 1]


def test_names_outside_ascii_and_a_byte_order_mark(tmp_path):
    paths, labels = read_list(write_list(tmp_path, "\ufeffé\u2028ü.jpg 4"), root="r")
    assert paths == ["r/é\u2028ü.jpg"]
    assert labels.tolist() == [4]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a.jpg 0\nb.jpg\nc.jpg 1", 2, "found 'b.jpg', expected `path label`"),
        ("a.jpg 0\nmy photo.jpg\n", 2, "the label 'photo.jpg' is not an integer"),
        ("a.jpg 0\nb.jpg 1.0", 2, "the label '1.0' is not an integer"),
        ("a.jpg 1_0", 1, "the label '1_0' is not an integer"),
        ("a.jpg 0\na\0b.jpg 1\n", 2, "the path 'a\\x00b.jpg' holds a zero byte"),
        ("a.jpg " + "x" * 10**5, 1, "the label '" + "x" * 100 + "' is not an integer"),
        ("x" * 10**5, 1, "found '" + "x" * 100 + "', expected"),
        ("a.jpg " + "1" * 10**4, 1, "does not fit 64 bits"),
        ("a.jpg -1", 1, "the label -1 is negative"),
        ("a.jpg 0\nb.jpg 9\nc.jpg 10\n", 3, "out of range 0..9; raise MODEL.NUM_CLASSES to at least 11"),
        ("a.jpg 0\n\nb.jpg 1\n", 2, "a blank line between others"),
        (b"a.jpg 0\nb.jpg 1\n\xff\xfe.jpg 1\n", 3, "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, line, reason):
    path = write_list(tmp_path, text)
    with pytest.raises(ListError) as caught:
        read_list(path, root="", num_classes=10)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_class_count_any_label_of_64_bits_is_taken(tmp_path):
    assert read_list(write_list(tmp_path, f"a {2**63 - 1}"), root="")[1].tolist() == [2**63 - 1]
    with pytest.raises(ListError, match="line 1: the label 9223372036854775808 does not fit"):
        read_list(write_list(tmp_path, f"a {2**63}"), root="")


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_an_empty_list_is_refused(tmp_path, text):
    with pytest.raises(ListError, match=r"train_list\.txt: the list is empty"):
        read_list(write_list(tmp_path, text), root="")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(ListError, match=r"none\.txt: no such list file"):
        read_list(tmp_path / "none.txt", root="")
    with pytest.raises(ListError, match="cannot be read"):
        read_list(tmp_path, root="")


# ------------------------------------------------------------------------------------------------ existence


def test_existing_images_pass_with_one_scan_a_folder_and_no_stat(tmp_path, monkeypatch):
    names = [f"{folder}/{i} x.png" for folder in ("a", "b", "a/c") for i in range(5)]
    write_images(tmp_path, names)
    (tmp_path / "link.png").symlink_to(tmp_path / names[0])
    paths = [str(tmp_path / name) for name in [*names, *names, "link.png"]]
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(missing.os, "scandir", lambda folder: scanned.append(folder) or scandir(folder))
    monkeypatch.setattr(missing.os, "stat", None)
    check_files("list.txt", paths)
    assert sorted(scanned) == sorted({os.path.dirname(path) for path in paths})


def test_a_folder_whose_name_is_too_long_is_a_missing_one(tmp_path):
    with pytest.raises(ListError, match=r"line 1: no such image: .*x/b\.jpg \(1 of 1 listed images missing\)$"):
        check_files("list.txt", [f"{tmp_path}/{'x' * 5000}/b.jpg"])


@pytest.mark.parametrize("bad", ["a/gone.png", "nowhere/x.png", "a/0.png/x.png", "a", "dangling.png", "a/0.png/"])
def test_the_first_missing_image_is_named(tmp_path, bad):
    write_images(tmp_path, ["a/0.png", "b/1.png"])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    paths = [str(tmp_path / name) for name in ("b/1.png", "a/0.png")] + [f"{tmp_path}/{bad}", f"{tmp_path}/b/z.png"]
    with pytest.raises(ListError) as caught:
        check_files("list.txt", paths)
    assert str(caught.value) == f"list.txt, line 3: no such image: {tmp_path}/{bad} (2 of 4 listed images missing)"


def test_relative_paths_without_a_folder(tmp_path, monkeypatch):
    write_images(tmp_path, ["0.png"])
    monkeypatch.chdir(tmp_path)
    check_files("list.txt", ["0.png"])
    with pytest.raises(ListError, match=r"line 2: no such image: 1\.png"):
        check_files("list.txt", ["0.png", "1.png"])


# ------------------------------------------------------------------------------------------------ samples


def make(tmp_path, *, transform=None, seed: int = 1, names=("a/0.png", "b c/1.png", "2.png"), **more):
    write_images(tmp_path, [name for name in names if not (tmp_path / name).exists()])
    list_file = write_list(tmp_path, "".join(f"{name} {5 - i}\n" for i, name in enumerate(names)))
    return LandmarkDataset(
        tmp_path, list_file, transform=transform or TrainTransform(32), num_classes=6, seed=seed, **more
    )


def test_a_training_sample_is_the_transform_with_the_draw_of_seed_epoch_index(tmp_path):
    dataset = make(tmp_path, seed=9)
    assert len(dataset) == 3
    assert dataset.labels.tolist() == [5, 4, 3]
    batch = dataset[(4, 1)]
    pixels = cv2.imread(str(tmp_path / "b c/1.png"))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([9, 4, 1])))
    assert batch.images.dtype == np.float32
    expected = transform_train(pixels, draw_train(rng, *pixels.shape[:2]), 32)
    assert np.array_equal(batch.images, expected.transpose(1, 2, 0)[None])
    assert batch.labels.dtype == batch.indices.dtype == np.int64
    assert (batch.labels.tolist(), batch.indices.tolist(), batch.broken) == ([4], [1], [])
    assert batch.shift.tolist() == [[0, 0, 0]]


def test_a_fast_sample_has_the_same_draw(tmp_path):
    exact, fast = make(tmp_path, seed=9), make(tmp_path, seed=9, transform=FastTrainTransform(32))
    for epoch in range(4):
        keys = [(epoch, i) for i in range(3)]
        want, got = exact.__getitems__(keys), fast.__getitems__(keys)
        assert got.images.dtype == np.uint8
        assert got.images.shape == want.images.shape == (3, 32, 32, 3)
        assert got.shift.dtype == np.float32
        assert len(set(map(tuple, got.shift.tolist()))) == 3
        assert np.array_equal(got.labels, want.labels)
        pixels = zip(got.images.astype(np.float32), got.shift, want.images, strict=True)
        for pixel, shift, image in pixels:
            difference = normalise(pixel, shift=shift).transpose(1, 2, 0) - image
            assert np.abs(difference).max() * 255 * 0.224 < 1.1  # rounding of a pixel, and of the resize's weights


def test_epoch_index_and_seed_each_change_the_draw_and_nothing_else_does(tmp_path):
    dataset = make(tmp_path)
    first = dataset[(0, 0)].images
    dataset[(3, 2)]
    assert np.array_equal(dataset[(0, 0)].images, first)
    assert np.array_equal(dataset.__getitems__([(0, 1), (0, 0)]).images[1:], first)
    assert not np.array_equal(dataset[(1, 0)].images, first)
    assert not np.array_equal(make(tmp_path, seed=2)[(0, 0)].images, first)


def test_samples_of_an_index_alone(tmp_path):
    batch = make(tmp_path, transform=Resized(36, 32)).__getitems__([2, 0])
    for i, name in enumerate(("2.png", "a/0.png")):
        expected = transform_test(cv2.imread(str(tmp_path / name)), 36, 32)
        assert np.array_equal(batch.images[i].transpose(2, 0, 1), expected)
    assert (batch.labels.tolist(), batch.indices.tolist()) == ([3, 5], [2, 0])


def test_paths_survive_being_packed(tmp_path):
    dataset = make(tmp_path, names=("é.png", "b c/ü x.png", "2.png"))
    assert [dataset.path(i) for i in range(3)] == [str(tmp_path / n) for n in ("é.png", "b c/ü x.png", "2.png")]


def test_a_set_of_a_million_images_holds_no_object_an_image(tmp_path):
    """What workers are handed and share must be few objects: touching one copies its page."""
    dataset = LandmarkDataset(
        "root",
        write_list(tmp_path, "".join(f"a/{i}.jpg {i}\n" for i in range(20000))),
        transform=TrainTransform(32),
        num_classes=None,
        seed=0,
        check=False,
    )
    assert dataset.path(19999) == "root/a/19999.jpg"
    assert len(pickle.dumps(dataset)) < 20000 * (len("root/a/19999.jpg") + 2 * 8) + 5000


def test_an_unreadable_image_is_returned_with_path_list_and_line(tmp_path):
    dataset = make(tmp_path)
    data = (tmp_path / "b c/1.png").read_bytes()
    (tmp_path / "b c/1.png").write_bytes(data[: len(data) // 2])
    error = dataset[(0, 1)]
    assert type(error) is ImageError
    where = f"{tmp_path}/train_list.txt, line 2: {tmp_path}/b c/1.png: truncated"
    assert str(error).startswith(where)
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ------------------------------------------------------------------------------------------------ broken images


NAMES = tuple(f"{i}.png" for i in range(6))


def breaking(tmp_path, *broken: int, **more) -> LandmarkDataset:
    dataset = make(tmp_path, names=NAMES, skip_broken=True, **more)
    for i in broken:
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:-20])
    return dataset


@pytest.mark.parametrize("transform", [TrainTransform(32), FastTrainTransform(32)])
def test_a_broken_image_is_replaced_by_the_next_one_that_can_be_read(tmp_path, transform):
    dataset = breaking(tmp_path, 1, 4, 5, transform=transform)
    batch = dataset.__getitems__([(7, i) for i in (0, 1, 4, 2)])
    assert batch.indices.tolist() == [0, 2, 0, 2]
    assert batch.labels.tolist() == [5, 3, 5, 3]
    for got, index in zip(range(4), (0, 2, 0, 2), strict=True):
        expected = dataset[(7, index)]
        assert np.array_equal(batch.images[got : got + 1], expected.images)
        assert np.array_equal(batch.shift[got : got + 1], expected.shift)
    lines = [2, 5, 6]
    assert len(batch.broken) == 3
    for message, line in zip(batch.broken, lines, strict=True):
        assert message.startswith(f"{tmp_path}/train_list.txt, line {line}: {tmp_path}/{line - 1}.png: truncated")
    assert dataset[(7, 0)].broken == []


def test_an_image_that_opencv_cannot_resize_is_broken(tmp_path):
    class Refusing(TrainTransform):
        def write(self, file, rng, out):
            if file.path.endswith("1.png"):
                cv2.resize(np.empty((0, 5, 3), np.float32), (32, 32))
            return super().write(file, rng, out)

    batch = breaking(tmp_path, transform=Refusing(32)).__getitems__([(0, 0), (0, 1)])
    assert batch.indices.tolist() == [0, 2]
    (message,) = batch.broken
    assert message.startswith(f"{tmp_path}/train_list.txt, line 2: {tmp_path}/1.png: OpenCV cannot crop or resize it (")
    assert "\n" not in message
    error = make(tmp_path, names=NAMES, transform=Refusing(32))[(0, 1)]
    assert type(error) is ImageError and str(error) == message


def test_a_batch_with_a_broken_image_leaves_its_memory_free(tmp_path):
    dataset = make(tmp_path, names=NAMES)
    (tmp_path / "2.png").write_bytes(b"nothing")
    dataset.worker = WorkerMemory(BatchMemory(workers=1, size=2 * dataset.image_bytes), 0)
    for _ in range(10):
        assert isinstance(dataset.__getitems__([(0, 1), (0, 2)]), ImageError)
    assert isinstance(dataset.__getitems__([(0, 1), (0, 3)]).images, Slot)


def test_a_list_without_a_readable_image_ends_in_an_error(tmp_path, monkeypatch):
    dataset = breaking(tmp_path, *range(6))
    error = dataset[(0, 4)]
    assert type(error) is ImageError
    assert str(error).startswith(f"{tmp_path}/train_list.txt, line 5: {tmp_path}/4.png: truncated")
    assert str(error).endswith("(nor can any of the 5 images after it be read)")
    monkeypatch.setattr(landmark, "_MOST_REPLACED", 3)
    assert str(dataset[(0, 4)]).endswith("(nor can any of the 2 images after it be read)")


def test_missing_images_are_found_at_construction(tmp_path):
    make(tmp_path)
    (tmp_path / "2.png").unlink()
    list_file = tmp_path / "train_list.txt"
    arguments = {"transform": TrainTransform(32), "num_classes": 6, "seed": 0}
    with pytest.raises(ListError, match=r"line 3: no such image: .*2\.png \(1 of 3"):
        LandmarkDataset(tmp_path, list_file, **arguments)
    error = LandmarkDataset(tmp_path, list_file, **arguments, check=False)[(0, 2)]
    assert "line 3" in str(error)
    assert "no such file" in str(error)


def test_the_real_set_is_read(shared):
    root = shared / "landmarks-mini"
    dataset = LandmarkDataset(root, root / "train_list.txt", transform=Resized(64, 64), num_classes=78, seed=0)
    assert len(dataset) == 244
    assert sorted(set(dataset.labels.tolist())) == list(range(78))
    assert dataset[243].images.shape == (1, 64, 64, 3)
