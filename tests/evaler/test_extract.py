import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core import builders
from core.checkpoint import checkpoint_path, write_checkpoint
from core.config import load_cfg
from core.environment import sha256_file
from datasets.image import ImageError, decode
from evaler import extract, features
from evaler.images import ImageList, crop, image_folder, read_cropped, revisited_set
from evaler.multiscale import describe
from tests.small_run import SMALL_MODEL, cut_short, overrides, photograph, retrieval_set, write_image

MEAN, SD = np.array([0.406, 0.456, 0.485]), np.array([0.225, 0.224, 0.229])
SCALES = [0.3535, 0.5, 0.7071, 1.0, 1.4142]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(4)
    return builders.build_descriptor(load_cfg(None, overrides(SMALL_MODEL))).double().eval()


def literal_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear, pixel by pixel: the centre of a new pixel falls between the centres of four old ones."""
    out = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * image.shape[0] / height - 0.5, 0), image.shape[0] - 1)
            u = min(max((x + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            top = image[y0, x0] * (1 - (u - x0)) + image[y0, x1] * (u - x0)
            bottom = image[y1, x0] * (1 - (u - x0)) + image[y1, x1] * (u - x0)
            out[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return out


def literal_description(network: nn.Module, image: np.ndarray, scales: list[float]) -> np.ndarray:
    total = np.zeros(network.fc.out_features)
    for scale in scales:
        width, height = round(image.shape[1] * scale), round(image.shape[0] * scale)
        scaled = image.astype(np.float64)
        if (width, height) != image.shape[1::-1]:
            scaled = literal_resize(scaled, width, height)
        planes = ((scaled / 255 - MEAN) / SD).transpose(2, 0, 1)
        with torch.no_grad():
            vector = network(torch.from_numpy(planes[None].copy()))[0].numpy()
        total += vector / np.sqrt((vector**2).sum())
    mean = total / len(scales)
    return mean / np.sqrt((mean**2).sum())


@pytest.mark.parametrize("scales", [SCALES, [1.0], [0.5, 1.4142]])
def test_description_against_pixels_in_loops(network, scales):
    image = photograph(1, 37, 51)
    got = describe(network, image, scales=scales)
    assert got.shape == (8,) and got.dtype == torch.float64
    assert got.norm().item() == pytest.approx(1.0, rel=1e-12)
    # Preprocessing rounds to float32.
    np.testing.assert_allclose(got.numpy(), literal_description(network, image, scales), rtol=0, atol=2e-5)


class Recorder(nn.Module):
    """Returns what its test wants and keeps the sizes it saw."""

    def __init__(self, vectors: list[list[float]]):
        super().__init__()
        self.vectors, self.seen = [torch.tensor([v]) for v in vectors], []
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return self.vectors[len(self.seen) - 1]


def test_every_scale_counts_the_same_whatever_its_length():
    got = describe(Recorder([[3.0, 0.0], [0.0, 0.01]]), photograph(0, 8, 8), scales=[1.0, 0.5])
    torch.testing.assert_close(got, torch.tensor([0.5**0.5, 0.5**0.5]))


def test_sizes_are_rounded_half_to_even():
    recorder = Recorder([[1.0]] * 3)
    describe(recorder, photograph(0, 7, 5), scales=[0.5, 1.5, 0.25])
    assert recorder.seen == [(1, 3, 4, 2), (1, 3, 10, 8), (1, 3, 2, 1)]


def test_a_side_that_vanishes_is_refused():
    with pytest.raises(ValueError, match=r"5 x 100 pixels has nothing left at scale 0\.1"):
        describe(Recorder([[1.0]]), photograph(0, 100, 5), scales=[0.1])


def test_crop_truncates_the_box():
    image = np.arange(10 * 12 * 3).reshape(10, 12, 3)
    assert crop(image, None) is image
    np.testing.assert_array_equal(crop(image, (1.9, 2.2, 7.99, 9.5)), image[2:9, 1:7])
    np.testing.assert_array_equal(crop(image, (0, 0, 12, 10)), image)
    np.testing.assert_array_equal(crop(image, (8, 6, 50.5, 50.5)), image[6:, 8:])  # cut off at the border, as published


def test_only_the_box_is_read(tmp_path):
    path = write_image(tmp_path / "a.png", photograph(0, 20, 30))
    np.testing.assert_array_equal(read_cropped(path, (2.5, 3.5, 10.5, 12.5)), decode(path)[3:12, 2:10])
    with pytest.raises(ImageError, match=rf"^{path}: the query's box \(40, 0, 50, 9\) lies outside the picture"):
        read_cropped(path, (40, 0, 50, 9))


@pytest.fixture
def tree(tmp_path):
    """A folder with equal basenames, several kinds of files, and sub-folders."""
    root = tmp_path / "photos"
    for seed, name in enumerate(("b/one.jpg", "a/one.jpg", "a/deep/two.PNG", "three.jpeg")):
        write_image(root / name, photograph(seed))
    (root / "a" / "readme.txt").touch()
    (root / "no_extension").touch()
    (root / "folder.jpg").mkdir()
    return root


def test_a_folder_is_listed_by_relative_path(tree):
    images, others = image_folder(tree)
    assert images.names == ["a/deep/two.PNG", "a/one.jpg", "b/one.jpg", "three.jpeg"]
    assert images.paths == [tree / name for name in images.names]
    assert images.boxes == [None] * 4 and others == 2


def test_folders_that_hold_nothing_to_describe(tmp_path, tree):
    with pytest.raises(ImageError, match=r"^INFER\.IMAGES .*absent: no such folder"):
        image_folder(tmp_path / "absent")
    with pytest.raises(ImageError, match=r"no image in it \(looked for \.bmp "):
        image_folder(tree / "folder.jpg")
    with pytest.raises(ImageError, match="no such folder"):
        image_folder(tree / "three.jpeg")


@pytest.mark.parametrize("name", [b"a\tb.jpg", b"a\nb.jpg", b"a\xffb.jpg"])
def test_a_name_that_could_not_be_written_down_is_refused_before_the_work(tree, name):
    with open(os.path.join(os.fsencode(tree), name), "wb"):
        pass
    with pytest.raises(ImageError, match="rename that file") as raised:
        image_folder(tree)
    assert "\n" not in str(raised.value)


def test_unusual_names_are_fine(tree):
    for name in ("ä ö.jpg", "a\u00a0b.jpg", "x'y\".jpg"):
        write_image(tree / "c.jpg", photograph(9)).rename(tree / name)
    assert len(image_folder(tree)[0]) == 7


@pytest.mark.parametrize("total", [1, 2, 3, 7, 11])
def test_shards_split_by_index_and_lose_nothing(total):
    images = ImageList([f"n{i}" for i in range(7)], [Path(f"p{i}") for i in range(7)], [(i, 0, 1, 1) for i in range(7)])
    parts = [images.shard(cut, total) for cut in range(1, total + 1)]
    for cut, part in enumerate(parts, start=1):
        expected = [i for i in range(7) if i % total == cut - 1]
        assert part.names == [f"n{i}" for i in expected] and len(part) == len(expected)
        assert part.paths == [Path(f"p{i}") for i in expected] and [box[0] for box in part.boxes] == expected


def test_the_hash_of_a_list_changes_with_all_that_matters(tree):
    images, _ = image_folder(tree)
    hashes = {images.sha256()}
    assert image_folder(tree)[0].sha256() in hashes
    hashes.add(ImageList(images.names[::-1], images.paths[::-1], images.boxes).sha256())
    hashes.add(ImageList(["x", *images.names[1:]], images.paths, images.boxes).sha256())
    hashes.add(ImageList(images.names, images.paths, [(0, 0, 9, 9), *images.boxes[1:]]).sha256())
    hashes.add(images.shard(1, 2).sha256())
    with open(images.paths[0], "ab") as file:
        file.write(b"\0")
    hashes.add(images.sha256())
    assert len(hashes) == 6


def test_missing_images_are_counted_and_the_first_is_named(tree):
    images, _ = image_folder(tree)
    images.paths[1].unlink()
    images.paths[3].unlink()
    with pytest.raises(ImageError, match=rf"^{images.paths[1]}: no such image \(2 of 4 images missing\)"):
        images.sha256()


@pytest.mark.parametrize("crop_query", [True, False])
def test_a_revisited_set(tmp_path, crop_query):
    sets = revisited_set(retrieval_set(tmp_path), "toy", crop_query=crop_query)
    assert list(sets) == ["queries", "database"]
    assert sets["queries"].names == ["query0", "query1"]
    assert sets["database"].names == [f"image{i}" for i in range(5)]
    assert sets["queries"].paths[1] == tmp_path / "toy" / "jpg" / "query1.jpg"
    boxes = [(3.7, 2.2, 40.9, 44.1), (3.7, 2.2, 40.9, 45.1)]
    assert sets["queries"].boxes == (boxes if crop_query else [None, None])
    assert sets["database"].boxes == [None] * 5


# ------------------------------------------------------------------------------------------------ the whole command


class Place:
    """A folder with a set and the command's output, and weights."""

    def __init__(self, root: Path, weights: Path):
        self.root, self.out, self.weights = root, root / "out", weights
        self.data = retrieval_set(root / "data")
        (root / "some.yaml").touch()

    def arguments(self, **more) -> list[str]:
        base = {"OUT_DIR": self.out, "INFER.DATA_DIR": self.data, "INFER.DATASETS": "toy", "TEST.WEIGHTS": self.weights}
        more = {key.replace("__", "."): value for key, value in more.items()}
        return overrides(SMALL_MODEL, {"NUM_GPUS": 0, "INFER.SCALES": "[0.5, 1]"}, base, more)

    def run(self, **more) -> None:
        extract.main(["--cfg", str(self.root / "some.yaml"), *self.arguments(**more)])

    def fails(self, capsys, **more) -> str:
        """Run in vain; return the one line on stderr."""
        with pytest.raises(SystemExit) as raised:
            self.run(**more)
        assert raised.value.code == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    def load(self, collection: str, name: str = "toy") -> features.Features:
        return features.load(self.out / "features" / name, collection)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two files of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in (4, 5):
        torch.manual_seed(seed)
        network = builders.build_descriptor(load_cfg(None, overrides(SMALL_MODEL)))
        torch.save(network.state_dict(), folder / f"{seed}.pyth")
    return folder / "4.pyth", folder / "5.pyth"


@pytest.fixture
def place(tmp_path, weights):
    return Place(tmp_path, weights[0])


@pytest.fixture
def described(monkeypatch):
    """Count the images that the network is asked about."""
    calls = []

    def counted(network, image, *, scales):
        calls.append(image.shape)
        return describe(network, image, scales=scales)

    monkeypatch.setattr(extract, "describe", counted)
    return calls


def test_descriptors_are_keyed_by_name_and_carry_where_they_come_from(place, capsys):
    place.run()
    out = capsys.readouterr().out
    assert f"weights: {place.weights}, on the CPU" in out and f"toy: descriptors are in {place.out}/features/toy" in out
    cfg = load_cfg(None, place.arguments())
    network = builders.build_descriptor(cfg).eval()
    network.load_state_dict(torch.load(place.weights, weights_only=True))
    for collection, boxed in (("queries", True), ("database", False)):
        found = place.load(collection)
        images = revisited_set(place.data, "toy", crop_query=True)[collection]
        assert found.names == images.names
        for row, (path, box) in enumerate(zip(images.paths, images.boxes, strict=True)):
            assert (box is not None) == boxed
            picture = decode(path)
            if box is not None:
                picture = picture[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]
            assert found.sizes[row].tolist() == [picture.shape[1], picture.shape[0]]
            np.testing.assert_array_equal(found.vectors[row], describe(network, picture, scales=[0.5, 1.0]).numpy())
        assert found.provenance["weights_sha256"] == sha256_file(place.weights)
        assert found.provenance["list_sha256"] == images.sha256()
        expected = {"weights": str(place.weights), "scales": [0.5, 1.0], "crop_query": True, "depth": 50}
        expected |= {"stride_1x1": False, "with_ma": False, "fusion": "orthogonal", "precision": "float32"}
        assert {key: found.provenance[key] for key in expected} == expected
        assert found.provenance["code_version"] and found.provenance["torch"] == torch.__version__
    written = sorted(path.name for path in place.out.rglob("*") if path.is_file())
    assert written == sorted(f"{c}.1-of-1.{s}" for c in ("queries", "database") for s in ("npy", "tsv", "json"))


def test_uncropped_queries(place):
    place.run(INFER__CROP_QUERY=False)
    queries = place.load("queries")
    assert queries.sizes.tolist() == [[60, 50], [59, 51]] and queries.provenance["crop_query"] is False


def test_equal_basenames_in_two_folders_are_two_images(place, tree, capsys):
    place.run(INFER__IMAGES=tree)
    assert "note: 2 files in " in capsys.readouterr().err
    found = place.load("images", "photos")
    assert found.names == ["a/deep/two.PNG", "a/one.jpg", "b/one.jpg", "three.jpeg"]
    assert not np.array_equal(found.vectors[1], found.vectors[2])
    assert not (place.out / "features" / "toy").exists()  # in place of the sets


@pytest.mark.parametrize("broken", ["query1", "image3"])
def test_an_unreadable_image_stops_with_its_path_and_nothing_is_left(place, capsys, broken):
    path = cut_short(place.data / "toy" / "jpg" / f"{broken}.jpg")
    assert place.fails(capsys).startswith(f"error: {path}: truncated")
    assert not place.out.exists()


def test_an_image_too_small_for_a_scale_is_named(place, capsys):
    path = write_image(place.data / "toy" / "jpg" / "image2.jpg", photograph(0, 1, 30))
    assert place.fails(capsys) == f"error: {path}: an image of 30 x 1 pixels has nothing left at scale 0.5"


def test_a_missing_image_of_any_set_stops_before_the_first_is_described(place, capsys, described):
    retrieval_set(place.data, "second")
    (place.data / "second" / "jpg" / "image4.jpg").unlink()
    line = place.fails(capsys, INFER__DATASETS="toy,second")
    assert line.startswith(f"error: {place.data}/second/jpg/image4.jpg: no such image") and described == []


def test_a_failing_set_leaves_the_complete_ones(place, capsys):
    retrieval_set(place.data, "second")
    cut_short(place.data / "second" / "jpg" / "image4.jpg")
    place.fails(capsys, INFER__DATASETS="toy,second")
    assert len(place.load("database").names) == 5 and not (place.out / "features" / "second").exists()


def test_what_is_there_is_used_again(place, described, capsys):
    place.run()
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    assert len(described) == 7
    place.run()
    assert len(described) == 7 and "toy: 5 descriptors of database are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "again"),
    [
        ({"INFER__SCALES": "[0.5, 2]"}, 7),
        ({"INFER__CROP_QUERY": False}, 7),
        ({"RESNET__STRIDE_1X1": True}, 7),
        ({"BN__EPS": 1e-3}, 7),
        ({"DATA_LOADER__NUM_WORKERS": 1, "RNG_SEED": 5, "PORT": 10002}, 0),
    ],
)
def test_what_was_made_in_another_way_is_made_again(place, described, more, again):
    place.run()
    described.clear()
    place.run(**more)
    assert len(described) == again


def test_other_weights_of_the_same_name_are_noticed(place, weights, described):
    place.weights = place.root / "weights.pyth"
    place.weights.write_bytes(weights[0].read_bytes())
    place.run()
    old = np.array(place.load("database").vectors)
    place.weights.write_bytes(weights[1].read_bytes())
    place.run()
    assert len(described) == 14 and not np.array_equal(place.load("database").vectors, old)


def test_a_changed_image_is_noticed_and_the_other_collection_kept(place, described):
    place.run()
    described.clear()
    write_image(place.data / "toy" / "jpg" / "image2.jpg", photograph(77, 30, 30))
    place.run()
    assert len(described) == 5


@pytest.mark.parametrize("suffix", ["npy", "tsv", "json"])
def test_a_damaged_or_absent_file_is_made_again(place, described, suffix):
    place.run()
    good = np.array(place.load("queries").vectors)
    for damage in (cut_short, Path.unlink):
        damage(place.out / "features" / "toy" / f"queries.1-of-1.{suffix}")
        described.clear()
        place.run()
        assert len(described) == 2
        np.testing.assert_array_equal(place.load("queries").vectors, good)


@pytest.mark.parametrize("total", [2, 9])
def test_shards_together_equal_the_single_run_byte_for_byte(place, total):
    place.run()
    whole = {c: place.load(c) for c in ("queries", "database")}
    place.out = place.root / "sharded"
    for cut in reversed(range(1, total + 1)):
        place.run(INFER__TOTAL_NUM=total, INFER__CUT_NUM=cut)
    for collection, expected in whole.items():
        found = place.load(collection)
        assert sorted(found.names) == sorted(expected.names)
        rows = [found.names.index(name) for name in expected.names]
        assert found.vectors[rows].tobytes() == expected.vectors.tobytes()
        assert found.sizes[rows].tobytes() == expected.sizes.tobytes()
        assert found.provenance == expected.provenance


def test_a_missing_shard_is_noticed_when_they_are_joined(place):
    place.run(INFER__TOTAL_NUM=3, INFER__CUT_NUM=2)
    with pytest.raises(features.FeaturesError, match="lacks cut 1, 3 of 3"):
        place.load("queries")


def test_the_newest_checkpoint_of_out_dir_is_used_and_named(place, capsys):
    cfg = load_cfg(None, place.arguments())
    model = builders.build_classifier(cfg)
    for epochs_done in (9999, 10000, 1):
        nn.init.constant_(model.fc.bias, epochs_done)
        content = {"epoch": epochs_done - 1, "model_state": model.state_dict(), "cfg": cfg.dump()}
        write_checkpoint(content, checkpoint_path(cfg.OUT_DIR, epochs_done))
    place.run(TEST__WEIGHTS="")
    newest = checkpoint_path(place.out, 10000)
    out = capsys.readouterr().out
    assert f"weights: {newest}, on the CPU" in out and "the classification head is left aside" in out
    assert place.load("queries").provenance["weights_sha256"] == sha256_file(newest)
    place.run()  # given weights win
    assert f"weights: {place.weights}, on the CPU" in capsys.readouterr().out


def test_without_any_weights(place, capsys):
    line = place.fails(capsys, TEST__WEIGHTS="")
    assert line == f"error: no weights: set TEST.WEIGHTS, or train first (no checkpoint in {place.out}/checkpoints)"
    assert not place.out.exists()


def test_weights_of_another_architecture_are_refused_with_what_differs(place, capsys):
    line = place.fails(capsys, MODEL__WITH_MA=True, MODEL__HEADS__REDUCTION_DIM=16)
    assert "MODEL.WITH_MA False (here True)" in line and "MODEL.HEADS.REDUCTION_DIM 8 (here 16)" in line
    assert not place.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_more_gpus_than_there_are_do_not_matter(place, capsys):
    place.run(NUM_GPUS=8, TRAIN__BATCH_SIZE=128)
    out, err = capsys.readouterr()
    assert "note: NUM_GPUS is 8, but no GPU can be used here: the CPU is\n" in err
    assert "on the CPU" in out and len(place.load("database").names) == 5


def test_nothing_to_extract(place, capsys):
    assert "name sets in INFER.DATASETS, or a folder in INFER.IMAGES" in place.fails(capsys, INFER__DATASETS="[]")


def test_a_defect_in_the_network_is_not_taken_for_a_mistake_of_the_user(place, monkeypatch):
    def broken(network, image, *, scales):
        return np.zeros(3) + np.zeros(4)

    monkeypatch.setattr(extract, "describe", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        place.run()


def test_the_manifest_is_plain_json_with_the_hashes_of_its_files(place):
    place.run()
    folder = place.out / "features" / "toy"
    manifest = json.loads((folder / "queries.1-of-1.json").read_text())
    for suffix, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / f"queries.1-of-1.{suffix}").read_bytes()).hexdigest() == digest
