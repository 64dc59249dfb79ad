import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core import builders
from core.base.files import sha256_file
from core.checkpoints.checkpoint import checkpoint_path, write_checkpoint
from core.config import load_cfg
from datasets.images.decode import decode
from datasets.lists.command import make_lists
from evaler.extraction import command as extract
from evaler.extraction import job as extraction_job
from evaler.extraction import join
from evaler.extraction.chunks import plans, read_plan
from evaler.extraction.multiscale import describe, describe_batch
from evaler.features import store as features
from evaler.scoring import labels as labelled_protocol
from evaler.sources.images import revisited_set
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
    """Note the size of every image that the network is asked about."""
    calls = []

    def counted(network, images, **more):
        calls.extend(image.shape for image in images)
        return describe_batch(network, images, **more)

    monkeypatch.setattr(extraction_job, "describe_batch", counted)
    return calls


def test_descriptors_are_keyed_by_name_and_carry_where_they_come_from(place, capsys):
    place.run()
    out = capsys.readouterr().out
    assert f"weights: {place.weights}, on the CPU" in out
    assert f"toy database: 5 descriptors are in {place.out}/features/toy" in out
    cfg = load_cfg(None, place.arguments())
    network = builders.build_descriptor(cfg).eval()
    network.load_state_dict(torch.load(place.weights, weights_only=True))
    for collection, boxed in (("queries", True), ("database", False)):
        found = place.load(collection)
        images = revisited_set(place.data, "toy", crop_query=True)[collection]
        assert found.names == images.names
        for row in range(len(images)):
            box = images.box(row)
            assert (box is not None) == boxed
            picture = decode(images.source(row))
            if box is not None:
                picture = picture[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]
            assert found.sizes[row].tolist() == [picture.shape[1], picture.shape[0]]
            expected = describe(network, picture, scales=[0.5, 1.0]).numpy()
            np.testing.assert_allclose(found.vectors[row], expected, rtol=0, atol=2e-6)
        assert found.provenance.weights_sha256 == sha256_file(place.weights)
        assert found.provenance.list_sha256 == images.sha256()
        expected = {"weights": str(place.weights), "scales": (0.5, 1.0), "crop_query": True, "depth": 50}
        expected |= {"stride_1x1": False, "with_ma": False, "fusion": "orthogonal", "precision": "fp32", "threads": 1}
        assert {key: getattr(found.provenance, key) for key in expected} == expected
        assert found.provenance.code_version and found.provenance.torch == torch.__version__
    written = sorted(path.name for path in place.out.rglob("*") if path.is_file())
    assert written == sorted(f"{c}.{s}" for c in ("queries", "database") for s in ("npy", "tsv", "json", "files"))


def test_uncropped_queries(place):
    place.run(INFER__CROP_QUERY=False)
    queries = place.load("queries")
    assert queries.sizes.tolist() == [[60, 50], [59, 51]] and queries.provenance.crop_query is False


def test_equal_basenames_in_two_folders_are_two_images(place, tree, capsys):
    place.run(INFER__IMAGES=tree)
    assert "note: " in capsys.readouterr().err
    found = place.load("images", "photos")
    assert found.names == ["a/deep/two.PNG", "a/one.jpg", "b/one.jpg", "three.jpeg"]
    assert not np.array_equal(found.vectors[1], found.vectors[2])
    assert not (place.out / "features" / "toy").exists()  # in place of the sets


@pytest.mark.parametrize("broken", ["query1", "image3"])
def test_an_unreadable_image_stops_with_its_path(place, capsys, broken):
    path = cut_short(place.data / "toy" / "jpg" / f"{broken}.jpg")
    assert place.fails(capsys).startswith(f"error: {path}: truncated")
    assert not list(place.out.rglob("*.npy"))


def test_an_image_too_small_is_named(place, capsys):
    path = write_image(place.data / "toy" / "jpg" / "image2.jpg", photograph(0, 15, 30))
    line = f"error: {path}: 30 x 15 pixels, its shorter side is below INFER.MIN_SIDE 16"
    assert place.fails(capsys) == line
    line = place.fails(capsys, INFER__MIN_SIDE=1, INFER__MAX_ASPECT=1.5)
    assert line.endswith("longer than INFER.MAX_ASPECT 1.5 to 1")


def test_a_missing_image_of_any_set_stops_before_the_first_is_described(place, capsys, described):
    retrieval_set(place.data, "second")
    (place.data / "second" / "jpg" / "image4.jpg").unlink()
    line = place.fails(capsys, INFER__DATASETS="toy,second")
    assert line.startswith(f"error: {place.data}/second/jpg/image4.jpg: no such image") and described == []
    assert not place.out.exists()


def test_what_is_done_stays_and_the_rest_is_done_when_the_image_is_mended(place, capsys, described):
    path = place.data / "toy" / "jpg" / "image4.jpg"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))  # of equal size: the list is the same
    place.fails(capsys, INFER__CHUNK_SIZE=2)
    assert len(described) == 6
    described.clear()
    path.write_bytes(good)
    place.run(INFER__CHUNK_SIZE=2)
    assert len(described) == 1 and len(place.load("database").names) == 5


def test_what_is_there_is_used_again(place, described, capsys):
    place.run()
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*.*")}
    assert len(described) == 7
    place.run()
    assert len(described) == 7 and "toy database: 5 images are described already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in place.out.rglob("*.*")}
    assert {path for path in before | after if before.get(path) != after.get(path)} <= set(place.out.rglob("*.files"))


@pytest.mark.parametrize(
    ("more", "again"),
    [
        ({"INFER__SCALES": "[0.5, 2]"}, 7),
        ({"INFER__CROP_QUERY": False}, 7),
        ({"RESNET__STRIDE_1X1": True}, 7),
        ({"BN__EPS": 1e-3}, 7),
        ({"INFER__MAX_LEVEL_PIXELS": 2000}, 7),
        ({"INFER__BATCH_SIZE": 2}, 7),
        ({"INFER__DTYPE": "float16"}, 0),  # rounded from what is there
        ({"INFER__NUM_WORKERS": 1, "RNG_SEED": 5, "PORT": 10002}, 0),
        ({"INFER__CHUNK_SIZE": 3, "INFER__MIN_SIDE": 8, "INFER__SKIP_BROKEN": 2}, 0),
    ],
)
def test_what_was_made_in_another_way_is_made_again(place, described, more, again):
    place.run()
    described.clear()
    place.run(**more)
    assert len(described) == again


def test_what_is_replaced_is_told_of(place, tree, capsys):
    place.run()
    place.run(INFER__SCALES="[1]")
    err = capsys.readouterr().err
    assert "note: toy database: 5 descriptors extracted in another way (differs in scales) are replaced once" in err
    other = write_image(place.root / "elsewhere" / "photos" / "x.png", photograph(1)).parent
    place.run(INFER__IMAGES=tree)
    place.run(INFER__IMAGES=other)  # a folder of the same name
    assert "photos images: 4 descriptors extracted in another way (differs in list_sha256)" in capsys.readouterr().err


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
    assert described == [(30, 30, 3)]


@pytest.mark.parametrize("suffix", ["npy", "tsv", "json", "files"])
def test_a_damaged_or_absent_file_is_made_again(place, described, suffix):
    place.run()
    good = np.array(place.load("queries").vectors)
    for damage in (cut_short, Path.unlink):
        damage(place.out / "features" / "toy" / f"queries.{suffix}")
        described.clear()
        place.run()
        assert len(described) == 2
        np.testing.assert_array_equal(place.load("queries").vectors, good)


def files(folder: Path) -> dict[str, bytes]:
    """But for what depends on how old the photographs are."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".files")}


@pytest.mark.parametrize(("total", "size", "workers", "batch"), [(2, 2, 0, 1), (9, 1, 2, 1), (3, 2, 1, 2)])
def test_shards_together_equal_the_single_run_byte_for_byte(place, capsys, total, size, workers, batch):
    settings = {"INFER__BATCH_SIZE": batch, "INFER__CHUNK_SIZE": size if batch > 1 else 128}
    place.run(**settings)
    whole, place.out = files(place.out / "features"), place.root / "sharded"
    settings |= {"INFER__CHUNK_SIZE": size, "INFER__NUM_WORKERS": workers, "INFER__TOTAL_NUM": total}
    for cut in reversed(range(1, total + 1)):
        assert not (place.out / "features" / "toy" / "database.json").exists()
        place.run(**settings, INFER__CUT_NUM=cut)
    assert "chunks are still to come" in capsys.readouterr().out
    assert files(place.out / "features") == whole


def test_another_number_of_shards_goes_on_with_what_is_there(place, described):
    place.run(INFER__TOTAL_NUM=3, INFER__CUT_NUM=2, INFER__CHUNK_SIZE=1)
    assert len(described) == 3  # query 1, images 1 and 4
    place.run(INFER__CHUNK_SIZE=1)
    assert len(described) == 7 and len(place.load("database").names) == 5


def test_under_torchrun_rank_and_world_size_are_the_shard(place, described, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    place.run(INFER__CHUNK_SIZE=1)
    assert len(described) == 3  # query 1, images 1 and 4
    line = place.fails(capsys, INFER__TOTAL_NUM=2)
    assert line == "error: INFER.TOTAL_NUM 2: under torchrun its processes are the shards; leave 1"


def test_unfinished_work_of_another_extraction_is_kept_and_told_of(place, capsys):
    place.run(INFER__TOTAL_NUM=2, INFER__CHUNK_SIZE=1)
    place.run(INFER__SCALES="[1]", INFER__CHUNK_SIZE=1)
    err = capsys.readouterr().err
    assert "database.chunks-" in err and "holds 3 of 5 chunks of another extraction (differs in scales)" in err
    assert len(list((place.out / "features" / "toy").glob("*.chunks-*"))) == 2
    place.run(INFER__CHUNK_SIZE=1)  # and can be gone on with
    assert place.load("database").provenance.scales == (0.5, 1.0)


def test_a_missing_shard_is_noticed_when_they_are_scored(place):
    place.run(INFER__TOTAL_NUM=3, INFER__CUT_NUM=2, INFER__CHUNK_SIZE=1)
    with pytest.raises(features.FeaturesError, match="the extraction of 'queries' is unfinished; run it again"):
        place.load("queries")


class TestRejected:
    @pytest.fixture
    def broken(self, place):
        """Three of the folder's six images cannot be described; returns the folder."""
        folder = place.root / "photos"
        for index in range(6):
            write_image(folder / f"{index}.jpg", photograph(index))
        (folder / "1.jpg").write_bytes(b"")
        cut_short(folder / "3.jpg")
        write_image(folder / "4.jpg", photograph(4, 10, 40))
        return folder

    @pytest.mark.parametrize("total", [1, 2])
    def test_every_image_is_accounted_for(self, place, broken, total, capsys):
        for cut in range(1, total + 1):
            place.run(
                INFER__IMAGES=broken,
                INFER__SKIP_BROKEN=3,
                INFER__CHUNK_SIZE=2,
                INFER__TOTAL_NUM=total,
                INFER__CUT_NUM=cut,
            )
        found = place.load("images", "photos")
        assert found.names == ["0.jpg", "2.jpg", "5.jpg"] and len(found.vectors) == 3
        assert [(r.index, r.name) for r in found.rejected] == [(1, "1.jpg"), (3, "3.jpg"), (4, "4.jpg")]
        assert "empty" in found.rejected[0].reason and "truncated" in found.rejected[1].reason
        assert found.rejected[2].reason == "40 x 10 pixels, its shorter side is below INFER.MIN_SIDE 16"
        manifest = json.loads((place.out / "features" / "photos" / "images.json").read_text())
        assert manifest["images"] == 6 == manifest["count"] + len(manifest["rejected"])
        out = capsys.readouterr().out
        assert f"3 images are rejected and listed in {place.out}/features/photos/images.json" in out

    @pytest.mark.parametrize(("total", "most"), [(1, 1), (1, 2), (2, 2), (3, 2)])
    def test_one_more_than_allowed_stops_whichever_shard_meets_it(self, place, broken, total, most, capsys):
        stopped = []
        for cut in range(1, total + 1):
            try:
                place.run(
                    INFER__IMAGES=broken,
                    INFER__SKIP_BROKEN=most,
                    INFER__CHUNK_SIZE=1,
                    INFER__TOTAL_NUM=total,
                    INFER__CUT_NUM=cut,
                )
            except SystemExit as error:
                stopped.append(error.code)
        assert stopped == [2]
        error = capsys.readouterr().err
        assert f"(and {most} images are rejected already, all that INFER.SKIP_BROKEN allows)" in error
        assert not (place.out / "features" / "photos" / "images.json").exists()

    def test_a_smaller_cap_afterwards_does_not_take_them(self, place, broken, capsys):
        place.run(INFER__IMAGES=broken, INFER__SKIP_BROKEN=3)
        assert place.fails(capsys, INFER__IMAGES=broken).startswith(f"error: {broken}/1.jpg: ")

    def test_a_missing_image_is_one_of_them(self, place, capsys):
        (place.data / "toy" / "jpg" / "image3.jpg").unlink()
        place.run(INFER__SKIP_BROKEN=1)
        assert [r.name for r in place.load("database").rejected] == ["image3"]
        assert "no such" in place.load("database").rejected[0].reason


def test_batches_hardly_change_the_descriptors(place, tree, described):
    folder = place.root / "many"
    for index in range(9):
        write_image(folder / f"{index}.png", photograph(index, *((40, 48) if index % 3 else (48, 40))))
    place.run(INFER__IMAGES=folder)
    single = place.load("images", "many").vectors
    for size in (2, 4, 8):
        place.run(INFER__IMAGES=folder, INFER__BATCH_SIZE=size)
        batched = place.load("images", "many")
        assert batched.names == [f"{index}.png" for index in range(9)]
        np.testing.assert_allclose(batched.vectors, single, rtol=0, atol=1e-6)


def test_places_that_training_has_not_seen_are_scored_by_their_list(place, capsys):
    """gldv2.py --unseen, then infer.py and evaluate_labels.py on its list: the score of these folders alone."""
    for seed in range(12):
        write_image(place.root / "photos" / f"place {seed % 4}" / f"{seed}.jpg", photograph(seed))
    lists = place.root / "data" / "mine"
    make_lists(tree=place.root / "photos", out=lists, unseen=0.5)
    unseen = (lists / "unseen_list.txt").read_text().splitlines()
    kept = {Path(line.rsplit(" ", 1)[0]).parent for line in unseen}
    assert len(unseen) == 6 and len(kept) == 2
    trained = [Path(line.rsplit(" ", 1)[0]) for line in (lists / "train_list.txt").read_text().splitlines()]
    assert trained and all(path.is_absolute() and path.parent not in kept for path in trained)
    place.run(INFER__IMAGES=lists / "unseen_list.txt")
    found = place.load("images", "unseen_list")
    assert found.names == [line.rsplit(" ", 1)[0].lstrip("/") for line in unseen]
    scores = []
    for arguments in (["--labels", lists / "unseen_list.txt"], []):  # or by the folders that their names tell
        json_file = place.root / "score.json"
        labelled_protocol.main(
            [str(place.out / "features" / "unseen_list"), *map(str, arguments), "--json", str(json_file)]
        )
        score = json.loads(json_file.read_text())
        for key in ("card", "ground_truth_sha256"):  # of other labels: numbers there, names of folders here
            del score[key]
        scores.append(score)
    assert scores[0] == scores[1] and (scores[0]["queries"], scores[0]["labels"]) == (6, 2)


def test_exports(place):
    place.run(INFER__EXPORT="mat,npz")
    folder = place.out / "features" / "toy"
    with np.load(folder / "queries.npz", allow_pickle=False) as found:
        assert list(found) == ["query0", "query1"]
    assert (folder / "database.mat").is_file()


def test_the_distractors(place, described):
    """Named by a list, without ground truth."""
    folder = place.data / "revisitop1m"
    names = ["a/x.jpg", "b/y.jpg", "b/z.jpg"]
    for seed, name in enumerate(names):
        write_image(folder / "jpg" / name, photograph(seed))
    (folder / "revisitop1m.txt").write_text("".join(f"{name}\n" for name in names))
    place.run(INFER__DATASETS="revisitop1m")
    assert place.load("distractors", "revisitop1m").names == names and len(described) == 3


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
    assert place.load("queries").provenance.weights_sha256 == sha256_file(newest)
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


def test_a_place_that_cannot_be_written_is_told_before_anything_is_described(place, described, capsys):
    place.out.mkdir()
    (place.out / "features").touch()
    assert "is a file; name another OUT_DIR" in place.fails(capsys)
    assert not described


def test_jpegs_are_not_decoded_on_a_gpu_that_is_not_there(place, capsys):
    assert "INFER.GPU_JPEG: there is no GPU" in place.fails(capsys, INFER__GPU_JPEG=True)
    assert not place.out.exists()


def test_nothing_to_extract(place, capsys):
    assert "name sets in INFER.DATASETS, or images in INFER.IMAGES" in place.fails(capsys, INFER__DATASETS="[]")


def test_a_defect_in_the_network_is_not_taken_for_a_mistake_of_the_user(place, monkeypatch):
    def broken(network, images, **more):
        return np.zeros(3) + np.zeros(4)

    monkeypatch.setattr(extraction_job, "describe_batch", broken)
    with pytest.raises(ValueError, match="could not be broadcast"):
        place.run()


def test_the_manifest_is_plain_json_with_the_hashes_of_its_files(place):
    place.run()
    folder = place.out / "features" / "toy"
    manifest = json.loads((folder / "queries.json").read_text())
    for suffix, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / f"queries.{suffix}").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("killed_at", ["its removal", "half of its removal"])
def test_a_join_that_is_killed_at_its_end_leaves_no_trap(place, monkeypatch, killed_at):
    """All is written, the chunks are there still, or half of them: neither a merge nor another run stumbles."""

    def killed(folder, *_, **how):
        if folder.exists():  # else a removal of what an earlier join has left, and there is nothing
            (folder / "plan.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_at == "its removal":
            patch.setattr(join, "discard", lambda folder: sys.exit(1))
        else:
            patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            place.run()
    join.main(["--cfg", str(place.root / "some.yaml"), *place.arguments()])
    expected = sha256_file(place.out / "features" / "toy" / "queries.npy")
    place.run()
    assert sha256_file(place.out / "features" / "toy" / "queries.npy") == expected
    assert not [path for path in (place.out / "features" / "toy").iterdir() if path.is_dir()]


def test_another_shard_joins_all_in_the_meantime(place, monkeypatch, capsys):
    """Two shards that end at once: whichever comes second says what the first says, and leaves nothing behind."""
    place.run(INFER__CHUNK_SIZE=1, INFER__TOTAL_NUM=2, INFER__CUT_NUM=1)
    with monkeypatch.context() as patch:  # all chunks are there, joined by none
        patch.setattr(extraction_job.Job, "finish", lambda job: "")
        place.run(INFER__CHUNK_SIZE=1, INFER__TOTAL_NUM=2, INFER__CUT_NUM=2)
    unfinished = place.out
    # before the lock, before rejected images are counted, before a shard looks for its chunks, while it looks
    for name in ("join", "read_header", "present", "read_records_of_chunk"):
        place.out = place.root / name
        shutil.copytree(unfinished, place.out)
        folder = place.out / "features" / "toy"
        itself = getattr(extraction_job, name)

        def second(*arguments, name=name, folder=folder, first=itself, **more):
            monkeypatch.setattr(extraction_job, name, first)
            for chunks in list(plans(folder)):
                join.join(folder, read_plan(chunks))
            return first(*arguments, **more)

        monkeypatch.setattr(extraction_job, name, second)
        place.run(INFER__CHUNK_SIZE=1, INFER__TOTAL_NUM=2, INFER__CUT_NUM=1)
        out = capsys.readouterr().out
        assert "toy queries: 2 descriptors are in" in out and "toy database: 5 descriptors are in" in out, name
        assert getattr(extraction_job, name) is itself and len(place.load("database").names) == 5
        assert not [path for path in folder.iterdir() if path.is_dir()], name


def test_a_damaged_collection_is_not_taken_for_one_that_another_shard_has_joined(place, capsys):
    place.run(INFER__CHUNK_SIZE=1)
    (place.out / "features" / "toy" / "database.npy").write_bytes(b"cut short")
    capsys.readouterr()
    place.run(INFER__CHUNK_SIZE=1, INFER__TOTAL_NUM=2, INFER__EXPORT="npz")
    assert "toy database: this shard is done; 2 of 5 chunks are still to come" in capsys.readouterr().out
