"""An extraction after photographs have come, gone or changed: only these are described, and the files are those of a
fresh extraction, byte for byte."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaler.extraction import command as extract
from evaler.extraction import job as extraction_job
from evaler.extraction import join
from evaler.extraction.chunks import plans, present
from evaler.features import identity
from evaler.features import store as features
from evaler.features.provenance import Provenance
from evaler.indexing import command as indexing
from evaler.sources.image_list import LooseFiles
from tests.small_run import overrides, photograph, retrieval_set, write_image

SUFFIXES = ("npy", "tsv", "json", "mat", "npz")


class Tiny(nn.Module):
    """One convolution in place of DOLG."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 8)
        self.requires_grad_(False)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


class Place:
    """A folder `photos`, and extractions of it into `out`."""

    def __init__(self, root: Path, described: list[float]):
        self.root, self.photos, self.described = root, root / "photos", described
        self.provenance: dict = {}

    def add(self, *seeds: int, folder: str = "photos") -> None:
        for seed in seeds:
            write_image(self.root / folder / f"{seed % 3}" / f"{seed * 7919 % 1000:03d}.png", photograph(seed))

    def run(self, images: object = None, out: str = "out", **more) -> int:
        """Extract; return the number of images that the network was asked about."""
        before = len(self.described)
        settings = {
            "NUM_GPUS": 0,
            "OUT_DIR": self.root / out,
            "INFER.IMAGES": images or self.photos,
            "TEST.WEIGHTS": "x",
        }
        settings |= {"INFER.CHUNK_SIZE": 4, "INFER.SCALES": "[1]", "MODEL.HEADS.REDUCTION_DIM": 8}
        settings |= {"INFER.EXPORT": "mat,npz"} | {key.replace("__", "."): value for key, value in more.items()}
        (self.root / "some.yaml").touch()
        extract.main(["--cfg", str(self.root / "some.yaml"), *overrides(settings)])
        return len(self.described) - before

    def folder(self, out: str = "out", name: str = "photos") -> Path:
        return self.root / out / "features" / name

    def check(self, images: object = None, name: str = "photos", collection: str = "images", **more) -> None:
        """The files of `out` are those of an extraction into a new folder, and no chunk is left."""
        shutil.rmtree(self.root / "fresh", ignore_errors=True)
        self.run(images, "fresh", **more)
        for suffix in SUFFIXES:
            found, expected = (self.folder(out, name) / f"{collection}.{suffix}" for out in ("out", "fresh"))
            if suffix == "mat":  # with the date of writing
                found, expected = found.read_bytes()[128:], expected.read_bytes()[128:]
            else:
                found, expected = found.read_bytes(), expected.read_bytes()
            assert found == expected, suffix
        assert not [path for path in self.folder(name=name).iterdir() if path.is_dir()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    described = []
    real = extraction_job.describe_batch

    def counted(network, images, **more):
        described.extend(images.float().mean((1, 2, 3)).tolist())
        return real(network, images, **more)

    place = Place(tmp_path, described)

    def load_network(cfg):
        own = {"weights": "none", "weights_sha256": "0", "batch_size": cfg.INFER.BATCH_SIZE or 1, "device": "CPU"}
        return Tiny().eval(), Provenance.from_json(own | {"scales": list(cfg.INFER.SCALES)} | place.provenance)

    monkeypatch.setattr(extraction_job, "describe_batch", counted)
    monkeypatch.setattr(extract, "load_network", load_network)
    place.add(*range(10))
    return place


@pytest.fixture(params=["stamps are trusted at once", "only bytes count"])
def trust(request, monkeypatch):
    if "bytes" not in request.param:
        monkeypatch.setattr(identity, "TOO_RECENT", -(10**9))


def rewrite(path: Path, seed: int) -> None:
    """Other bytes of equal length, under the old size and time of change."""
    status = path.stat()
    old, new = path.read_bytes(), write_image(path.with_suffix(".bmp"), photograph(seed))
    content = new.read_bytes()
    assert path.suffix == ".bmp" or old
    new.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# ------------------------------------------------------------------------------------------------ what came and went


def test_new_removed_renamed_and_touched_photographs(place, trust, capsys):
    assert place.run() == 10
    place.add(20, 21)
    assert place.run() == 2
    assert "10 images of this shard's 12 are unchanged, their descriptors are taken over" in capsys.readouterr().out
    place.check()
    for path in sorted(place.photos.rglob("*.png"))[::5]:
        path.unlink()
    assert place.run() == 0
    place.check()
    paths = sorted(place.photos.rglob("*.png"))
    paths[0].rename(paths[0].with_name("new name.png"))
    os.utime(paths[1])
    shutil.copy(paths[2], paths[2].with_name("copy.png"))
    assert place.run() == 2  # the two of new names
    place.check()


def test_changed_bytes_of_equal_size_and_time_are_noticed(place, trust):
    """In place, through a link, and by a file that takes the other's place."""
    for index in range(4):
        write_image(place.photos / f"{index}.bmp", photograph(30 + index))
    (place.photos / "link.bmp").symlink_to("3.bmp")
    assert place.run() == 15
    rewrite(place.photos / "0.bmp", 50)
    assert place.run() == 1
    place.check()
    rewrite(place.photos / "3.bmp", 51)  # and what leads there
    assert place.run() == 2
    place.check()
    one, two = place.photos / "1.bmp", place.photos / "2.bmp"
    times = one.stat().st_mtime_ns
    os.utime(two, ns=(times, times))
    one.rename(place.root / "x")
    two.rename(one)
    (place.root / "x").rename(two)
    assert place.run() == 2
    place.check()


def test_unchanged_photographs_are_not_read(place, monkeypatch):
    monkeypatch.setattr(identity, "TOO_RECENT", -(10**9))
    place.run()
    place.add(20)
    read, real = [], LooseFiles.read

    def counted(self, index):
        read.append(self.source(index))
        return real(self, index)

    monkeypatch.setattr(LooseFiles, "read", counted)
    assert place.run() == 1 and len(read) == 1
    read.clear()
    assert place.run() == 0 and read == []


def test_a_copy_of_the_photographs_is_read_once_and_not_described(place, monkeypatch):
    place.run()
    before = {path.name: path.read_bytes() for path in place.folder().iterdir()}
    shutil.copytree(place.photos, place.root / "copy" / "photos")
    shutil.rmtree(place.photos)
    monkeypatch.setattr(identity, "TOO_RECENT", -(10**9))
    assert place.run(place.root / "copy" / "photos") == 0
    after = {path.name: path.read_bytes() for path in place.folder().iterdir()}
    assert {name for name in before if before[name] != after[name]} <= {"images.files", "images.mat"}
    monkeypatch.setattr(LooseFiles, "read", lambda self, index: pytest.fail("read again"))
    assert place.run(place.root / "copy" / "photos") == 0


def test_the_old_collection_is_whole_until_the_new_one_is(place):
    place.run()
    old = features.load(place.folder(), "images").names
    place.add(20, 21)
    assert sum(place.run(INFER__TOTAL_NUM=2, INFER__CUT_NUM=cut) for cut in (2,)) < 3
    assert features.load(place.folder(), "images").names == old
    place.run(INFER__TOTAL_NUM=2, INFER__CUT_NUM=1)
    assert len(features.load(place.folder(), "images").names) == 12
    place.check()


# --------------------------------------------------------------------------------------------------- lists, archives


def test_lists(place):
    names = [path.relative_to(place.root).as_posix() for path in sorted(place.photos.rglob("*.png"))]
    listed = place.root / "mine.txt"
    listed.write_text("\n".join(names[:7]))
    assert place.run(listed) == 7
    listed.write_text("\n".join([names[9], *names[6:1:-1], names[8]]))  # another order
    assert place.run(listed) == 2
    place.check(listed, name="mine")
    listed.write_text("".join(f"{place.root / name} 1\n" for name in names))  # a list of training, of the same images
    assert place.run(listed) == 3
    place.check(listed, name="mine")


def test_archives(place, trust):
    def pack(*names: Path, mode: str) -> None:
        with tarfile.open(place.root / "set.tar", mode) as tar:
            for path in names:
                tar.add(path, arcname=path.relative_to(place.photos).as_posix())

    paths = sorted(place.photos.rglob("*.png"))
    pack(*paths[:6], mode="w")
    assert place.run(place.root / "set.tar") == 6
    pack(*paths[6:], mode="a")
    assert place.run(place.root / "set.tar") == 4
    place.check(place.root / "set.tar", name="set")
    shutil.copy(paths[0], paths[1])
    pack(*paths, mode="w")
    assert place.run(place.root / "set.tar") == 1
    place.check(place.root / "set.tar", name="set")


def test_the_box_of_a_query_counts(place, trust):
    data = retrieval_set(place.root / "data", queries=3, database=4)
    settings = {"INFER__IMAGES": "", "INFER__DATA_DIR": data, "INFER__DATASETS": "toy"}
    assert place.run(**settings) == 7
    truth = (data / "toy" / "gnd_toy.pkl").read_bytes()
    changed = truth.replace(np.array(45.1, ">f8").tobytes(), np.array(43.1, ">f8").tobytes())
    assert changed != truth
    (data / "toy" / "gnd_toy.pkl").write_bytes(changed)
    assert place.run(**settings) == 1
    place.check(name="toy", collection="queries", **settings)


# ---------------------------------------------------------------------------------------------- nothing wrong is taken


@pytest.mark.parametrize("key", ["weights_sha256", "scales", "code_version", "torch", "device", "crop_query"])
def test_other_weights_settings_or_versions_take_nothing(place, key):
    place.run()
    place.add(20)
    place.provenance = {key: "other"}
    assert place.run() == 11
    place.check()


def test_rounded_descriptors_become_no_exact_ones(place):
    place.run(INFER__DTYPE="float16")
    place.add(20)
    assert place.run(INFER__DTYPE="float16") == 1
    place.check(INFER__DTYPE="float16")
    assert place.run() == 11
    assert place.run(INFER__DTYPE="float16") == 0
    place.check(INFER__DTYPE="float16")


def test_an_image_that_would_now_be_rejected_is(place):
    for index in range(3):
        write_image(place.photos / f"{index}.jpg", photograph(index, 18, 18))
    place.run()
    place.add(20)
    settings = {"INFER__MIN_SIDE": 20, "INFER__SKIP_BROKEN": 3}
    assert place.run(**settings) == 1
    place.check(**settings)
    place.add(21)
    assert place.run(INFER__MAX_PIXELS=1000, INFER__SKIP_BROKEN=13) == 3  # the small ones
    place.check(INFER__MAX_PIXELS=1000, INFER__SKIP_BROKEN=13)


@pytest.mark.parametrize("damage", ["absent", "cut", "a flipped bit", "of another state"])
def test_without_a_sound_record_all_is_described(place, damage, capsys):
    place.run()
    path = place.folder() / "images.files"
    content = bytearray(path.read_bytes())
    if damage == "of another state":
        place.add(20)
        place.run()
    elif damage == "a flipped bit":
        content[-1] ^= 1
    path.write_bytes(content[:-48] if damage == "cut" else content)
    if damage == "absent":
        path.unlink()
    capsys.readouterr()
    assert place.run() >= 10
    assert "images.files: missing or damaged" in capsys.readouterr().err
    place.check()


def test_broken_images_are_tried_again(place):
    bad = write_image(place.photos / "bad.jpg", photograph(5))
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    assert place.run(INFER__SKIP_BROKEN=2) == 10
    place.add(20)
    assert place.run(INFER__SKIP_BROKEN=2) == 1
    place.check(INFER__SKIP_BROKEN=2)
    bad.write_bytes(good)
    assert place.run() == 1
    place.check()


def test_limits_that_change_count(place, monkeypatch):
    """Between two runs, and between a stop and the next start."""
    for index in range(3):
        write_image(place.photos / f"{index}.jpg", photograph(index, 18, 18))
    tight = {"INFER__MIN_SIDE": 20, "INFER__SKIP_BROKEN": 3}
    assert place.run(**tight) == 10
    assert place.run() == 3
    assert place.run(**tight) == 0
    assert len(features.load(place.folder(), "images").names) == 10
    place.add(20)
    place.provenance = {"torch": "1"}
    stop_at(place, monkeypatch, 11)
    place.run(**tight)
    place.check(**tight)


def test_what_cannot_be_read_does_not_have_the_collection_written_again(place):
    os.mkfifo(place.photos / "pipe.jpg")
    assert place.run(INFER__SKIP_BROKEN=1) == 10
    before = (place.folder() / "images.npy").stat().st_ino
    assert place.run(INFER__SKIP_BROKEN=1) == 0
    assert (place.folder() / "images.npy").stat().st_ino == before
    (place.photos / "pipe.jpg").unlink()
    write_image(place.photos / "pipe.jpg", photograph(5))
    assert place.run() == 1


def test_an_archive_of_the_old_size_and_time_is_indexed_again(place, trust):
    paths = [write_image(place.root / f"{index}.bmp", photograph(30 + index)) for index in range(3)]
    archive = place.root / "set.tar"

    def pack(*order: int) -> os.stat_result:
        with tarfile.open(archive, "w") as tar:
            for index in order:
                tar.add(paths[index], arcname=f"{index}.bmp")
        return archive.stat()

    old = pack(0, 1, 2)
    assert place.run(archive) == 3
    assert pack(1, 0, 2).st_size == old.st_size
    os.utime(archive, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert place.run(archive) == 0
    place.check(archive, name="set")


# -------------------------------------------------------------------------------------------------- stopped on its way


class Stop(BaseException):
    pass


def stop_at(place: Place, monkeypatch, number: int, **more) -> None:
    """Run until the network is asked for the image of this number, from 0."""
    real, last = extraction_job.describe_batch, len(place.described) + number

    def stopping(network, images, **how):
        if len(place.described) >= last:
            raise Stop
        return real(network, images, **how)

    with monkeypatch.context() as patch:
        patch.setattr(extraction_job, "describe_batch", stopping)
        with pytest.raises(Stop):
            place.run(**more)


def test_stopped_and_more_photographs_before_it_goes_on(place, trust, monkeypatch, capsys):
    """The work of the former list is taken over, and its folder removed in the end."""
    stop_at(place, monkeypatch, 9)
    place.add(20, 21, 22)
    assert place.run() == 5  # three new ones, and two whose chunk was not whole
    assert "descriptors of images that are the same are taken over" in capsys.readouterr().err
    place.check()


def test_stopped_while_it_takes_over(place, monkeypatch):
    place.run()
    place.add(20, 21, 22, 23)
    stop_at(place, monkeypatch, 2)
    (folder,) = plans(place.folder())
    assert present(folder)
    assert len(features.load(place.folder(), "images").names) == 10
    place.add(24)
    assert place.run() <= 5
    place.check()


def test_an_image_that_changes_while_it_is_stopped(place, trust, monkeypatch):
    """Of equal size, so that the list is the same: its chunk is set aside, and the others in it are taken over."""
    for index in range(10):
        write_image(place.photos / f"{index}.bmp", photograph(30 + index))
    stop_at(place, monkeypatch, 17)
    first = place.photos / "0" / sorted(os.listdir(place.photos / "0"))[0]
    assert first.is_file()
    rewrite(place.photos / "5.bmp", 70)
    (folder,) = plans(place.folder())
    assert len(present(folder)) == 4
    stop_at(place, monkeypatch, 0)  # stopped once more, before that one is described
    assert len(present(folder)) == 3 and len(list(folder.glob("*.changed"))) == 1
    assert place.run() == 1 + 4
    place.check()


def test_shards_take_over_their_parts(place, trust):
    place.run()
    place.add(*range(20, 28))
    assert sum(place.run(INFER__TOTAL_NUM=3, INFER__CUT_NUM=cut) for cut in (3, 1, 2)) == 8
    place.check()


def test_what_workers_read_is_known(place):
    assert place.run(INFER__NUM_WORKERS=1) == 10
    place.add(20)
    assert place.run(INFER__NUM_WORKERS=1) == 1
    place.check()


def test_batches_take_over_what_is_the_same_up_to_rounding(place, capsys):
    place.run(INFER__BATCH_SIZE=3)
    place.add(20, 21)
    assert place.run(INFER__BATCH_SIZE=3) == 2
    assert "described in other batches" in capsys.readouterr().err
    place.run(out="fresh", INFER__BATCH_SIZE=3)
    found, fresh = (features.load(place.folder(out), "images") for out in ("out", "fresh"))
    assert found.names == fresh.names and found.provenance == fresh.provenance
    np.testing.assert_allclose(found.vectors, fresh.vectors, rtol=0, atol=1e-6)


def test_another_folder_of_the_same_name_loses_nothing(place, monkeypatch):
    """Its unfinished chunks are kept: nothing of them was taken."""
    stop_at(place, monkeypatch, 9)
    place.add(*range(40, 46), folder="elsewhere/photos")
    assert place.run(place.root / "elsewhere" / "photos") == 6
    assert len(list(plans(place.folder()))) == 1
    assert place.run() == 2
    place.check()


def test_a_shorter_list_does_not_cost_the_work_of_a_longer_one(place, monkeypatch):
    """What was begun of the longer one is kept until a collection has all of it."""
    stop_at(place, monkeypatch, 9)
    paths = sorted(place.photos.rglob("*.png"))
    for path in paths[1:]:
        path.rename(path.with_suffix(".away"))
    assert place.run() == 0
    for path in paths[1:]:
        path.with_suffix(".away").rename(path)
    assert place.run() == 2
    place.check()


def test_rounded_descriptors_in_chunks_become_no_exact_ones(place, monkeypatch):
    place.run(INFER__DTYPE="float16")
    place.add(20, 21, 22, 23)
    stop_at(place, monkeypatch, 3, INFER__DTYPE="float16")
    (folder,) = plans(place.folder())
    assert present(folder)
    assert 10 <= place.run() < 14  # but for what was described for these chunks
    place.check()


# ------------------------------------------------------------------------------------------------ with other commands


def test_a_set_with_more_added_is_gone_on_with(place, trust):
    """index.py --add, and then the folder that holds both."""
    place.run()
    place.add(20, 21)
    new = [path.relative_to(place.photos) for path in place.photos.rglob("*.png")]
    old = features.load(place.folder(), "images").names
    listed = place.photos / "new.txt"
    listed.write_text("".join(f"{name}\n" for name in new if str(name) not in old))
    assert place.run(listed) == 2
    indexing.add(place.folder(), "images", place.folder(name="new"))
    assert len(features.load(place.folder(), "images").names) == 12
    listed.unlink()
    assert place.run() == 0
    place.check()


def test_what_was_added_from_another_version_is_described_again(place):
    place.run()
    place.add(20, 21, folder="more")
    place.provenance = {"torch": "1.0"}
    place.run(place.root / "more")
    place.provenance = {}
    indexing.add(place.folder(), "images", place.folder(name="more"))
    for path in (place.root / "more").rglob("*.png"):
        shutil.copy(path, place.photos / path.parent.name / path.name)
    assert place.run() == 2
    place.check()


def test_chunks_that_are_merged_bring_their_record(place):
    place.run(INFER__TOTAL_NUM=2, INFER__CUT_NUM=1)
    (folder,) = plans(place.folder())
    (place.root / "away").mkdir()
    folder.rename(place.root / "away" / folder.name)
    place.run(INFER__TOTAL_NUM=2, INFER__CUT_NUM=2)
    for path in (place.root / "away" / folder.name).glob("*.chunk"):
        path.rename(folder / path.name)
    join.main(["--cfg", str(place.root / "some.yaml"), "OUT_DIR", str(place.root / "out"), "INFER.EXPORT", "mat,npz"])
    place.add(20)
    assert place.run() == 1
    place.check()
