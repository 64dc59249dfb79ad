"""Searching an extracted folder by photographs, exactly and by a faiss index, and adding to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from core.arguments import split_settings
from core.base.files import sha256_file
from core.config import load_cfg
from evaler.extraction import command as extract
from evaler.features import store as features
from evaler.features.places import find_collection
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, save
from evaler.indexing import command as indexing
from evaler.indexing import faiss_index
from evaler.indexing import search as neighbours
from evaler.indexing.checked_results import check_found
from tests.evaler.test_describer import MODELS, write_weights
from tests.small_run import ROOT, child_environment, overrides, photograph, write_image

COUNT = 12
PROVENANCE = {"weights_sha256": "a", "scales": [1.0], "list_sha256": "x"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A folder of photographs and its descriptors."""
    root = tmp_path_factory.mktemp("search")
    for seed in range(COUNT):
        write_image(root / "photos" / f"{seed % 2}" / f"{seed:02d}.png", photograph(seed, 48 + seed, 60))
    (root / "c.yaml").touch()
    weights = write_weights(root / "w.pyth", MODELS["small"])
    settings = overrides(
        MODELS["small"],
        {"NUM_GPUS": 0, "INFER.SCALES": "[0.5, 1]", "OUT_DIR": root / "out", "TEST.WEIGHTS": weights},
    )
    extract.main(["--cfg", str(root / "c.yaml"), *settings, "INFER.IMAGES", str(root / "photos")])
    return root, settings


def command(extracted, capsys, *more, main=neighbours.main, queries=("photos/1/03.png",), without=()):
    root, settings = extracted
    pairs = list(zip(settings[::2], settings[1::2], strict=True))
    settings = [part for key, value in pairs if key not in without for part in (key, value)]
    place = str(root / "out" / "features" / "photos")
    options, more = split_settings(list(more))
    main(["--cfg", str(root / "c.yaml"), *options, place, *(str(root / query) for query in queries), *settings, *more])
    return capsys.readouterr()


def test_a_photograph_of_the_set_is_found_first_and_all_are_in_order(extracted, capsys, tmp_path):
    root, _ = extracted
    out, _ = command(extracted, capsys, "--top", "20", "--json", str(tmp_path / "found.json"))
    (result,) = json.loads((tmp_path / "found.json").read_text())
    stored = features.load(root / "out" / "features" / "photos", "images")
    scores = stored.vectors @ stored.vectors[stored.names.index("1/03.png")]
    assert [entry["name"] for entry in result["found"]] == [stored.names[i] for i in np.argsort(-scores)]
    assert result["found"][0] == {"name": "1/03.png", "score": pytest.approx(1, abs=1e-5)}
    assert "   1  1.0000  1/03.png" in out


def test_the_weights_of_the_set_are_used_where_none_are_named(extracted, capsys):
    out, err = command(extracted, capsys, "--top", "1", without=("TEST.WEIGHTS",))
    assert "w.pyth" in out and "1/03.png" in out and not err


def test_a_query_described_otherwise_is_refused(extracted, capsys):
    with pytest.raises(SystemExit) as caught:
        command(extracted, capsys, "INFER.SCALES", "[1]")
    assert caught.value.code == 2
    assert "in another way than the query would be: scales [0.5, 1.0] there, [1.0] here" in capsys.readouterr().err


@pytest.mark.parametrize(("query", "message"), [("absent.png", "absent.png: no such file"), ("c.yaml", "c.yaml: ")])
def test_a_query_that_cannot_be_read(extracted, capsys, query, message):
    with pytest.raises(SystemExit):
        command(extracted, capsys, queries=(query,))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_index_is_built_used_and_refused_when_it_is_another(extracted, capsys, monkeypatch):
    pytest.importorskip("faiss")
    root, _ = extracted
    place = root / "out" / "features" / "photos"
    exact, _ = command(extracted, capsys)
    with pytest.raises(SystemExit):
        command(extracted, capsys, "SEARCH.INDEX", "Flat")
    assert "images.faiss: no index; build it with evaler/index.py" in capsys.readouterr().err
    built, _ = command(extracted, capsys, "SEARCH.INDEX", "Flat", main=indexing.main, queries=())
    assert "Flat, 100.0 % of the exact first 10 are found" in built
    found, _ = command(extracted, capsys, "SEARCH.INDEX", "Flat")
    assert found == exact
    for settings, message in (
        (["SEARCH.INDEX", "HNSW4"], "is Flat, SEARCH.INDEX HNSW4"),
        (["SEARCH.INDEX", "Flat", "SEARCH.PARAMETERS", "nonsense=3"], "SEARCH.PARAMETERS nonsense=3: faiss refuses it"),
    ):
        with pytest.raises(SystemExit):
            command(extracted, capsys, *settings)
        assert message in capsys.readouterr().err
    for content, message in ((b"{", "not the description"), (b"[]", "not the description")):
        (place / "images.faiss.json").write_bytes(content)
        with pytest.raises(SystemExit):
            command(extracted, capsys, "SEARCH.INDEX", "Flat")
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(extracted, capsys, "SEARCH.INDEX", "Nonsense8", main=indexing.main, queries=())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: SEARCH.INDEX Nonsense8: faiss refuses it")
    (place / "images.faiss").unlink()
    (place / "images.faiss.json").unlink()


def some_features(names, seed=0, **provenance):
    vectors = np.random.default_rng(seed).normal(size=(len(names), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Features(
        list(names), vectors, np.full((len(names), 2), 9, np.int32), Provenance.from_json(PROVENANCE | provenance)
    )


def test_an_approximate_index_has_the_recall_it_tells(tmp_path):
    faiss = pytest.importorskip("faiss")
    save(tmp_path, "images", some_features([str(i) for i in range(3000)]))
    found = {}
    for probes in (1, 64):
        cfg = load_cfg(None, ["SEARCH.INDEX", "IVF64,Flat", "SEARCH.PARAMETERS", f"nprobe={probes}", "NUM_GPUS", "0"])
        found[probes] = faiss_index.build(cfg, tmp_path, "images")
    assert found[64] == 1 and 0.05 < found[1] < 0.9
    index = faiss_index.read(cfg, tmp_path, "images")
    assert index.ntotal == 3000 and faiss.extract_index_ivf(index).nprobe == 64
    with open(tmp_path / "images.faiss", "r+b") as file:
        file.write(b"x")
    with pytest.raises(FeaturesError, match="damaged"):
        faiss_index.read(cfg, tmp_path, "images")
    save(tmp_path, "images", some_features(["a", "b"]))
    with pytest.raises(FeaturesError, match="of other descriptors"):
        faiss_index.read(cfg, tmp_path, "images")


SEARCHED = ["SEARCH.INDEX", "Flat", "NUM_GPUS", "0"]


def put_index(folder, index):
    """With a description that fits it."""
    faiss = pytest.importorskip("faiss")
    path, told = faiss_index.paths(folder, "images")
    faiss.write_index(index, str(path))
    npy = features.read_manifest(folder, "images")["sha256"]["npy"]
    told.write_text(json.dumps({"factory": "Flat", "npy_sha256": npy, "sha256": sha256_file(path)}))


def filled(factory, dim=8, count=20, metric=0, ids=None):
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(dim, factory, metric)
    vectors = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    index.add(vectors) if ids is None else index.add_with_ids(vectors, ids)
    return index


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dim": 9}, "holds 20 x 9 numbers, the descriptors are 20 x 8"),
        ({"count": 19}, "holds 19 x 8 numbers, the descriptors are 20 x 8"),
        ({"metric": 1}, "orders by another metric than the inner product"),
        ({"factory": "L2norm,Flat", "metric": 1}, "orders by another metric than the inner product"),
        ({"factory": "IDMap,Flat", "ids": np.arange(20)}, "numbers of its own"),
    ],
)
def test_an_index_is_not_believed_for_its_description(tmp_path, how, message):
    save(tmp_path, "images", some_features([str(i) for i in range(20)]))
    put_index(tmp_path, filled(**{"factory": "Flat"} | how))
    with pytest.raises(FeaturesError, match=message):
        faiss_index.read(load_cfg(None, SEARCHED), tmp_path, "images")


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x4"])
def test_an_index_whose_numbers_are_mixed_is_refused(tmp_path, factory):
    faiss = pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    save(tmp_path, "images", Features([str(i) for i in range(400)], vectors, np.ones((400, 2), np.int32), Provenance()))
    for ids in (np.arange(400), np.random.default_rng(1).permutation(400)):
        index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add_with_ids(vectors, ids)
        put_index(tmp_path, index)
        if ids[0] == 0 and ids[1] == 1:
            faiss_index.read(load_cfg(None, SEARCHED), tmp_path, "images")
    with pytest.raises(FeaturesError, match="not those of the images it names"):
        faiss_index.read(load_cfg(None, SEARCHED), tmp_path, "images")


@pytest.mark.parametrize(
    ("scores", "rows", "message"),
    [
        ([2, 1], [0, 5], "rows that are none of the 5 images"),
        ([2, 1], [-2, 0], "rows that are none of the 5 images"),
        ([2, 1], [3, 3], "one image twice"),
        ([1, 2], [0, 1], "scores do not fall"),
        ([np.nan, 1], [0, 1], "not finite"),
        ([2, 1], [-1, 1], "behind empty places"),
    ],
)
def test_results_are_not_believed(scores, rows, message):
    scores, rows = np.array([scores], np.float32), np.array([rows])
    with pytest.raises(FeaturesError, match=message):
        check_found(scores, rows, 5, source="SEARCH.INDEX")
    check_found(np.array([[2, 1, -9]], np.float32), np.array([[4, 0, -1]]), 5, source="SEARCH.INDEX")


def test_what_a_gpu_cannot_search_is_told_in_one_line(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")

    def refuse(*_):
        raise RuntimeError("Error in faiss::gpu at GpuIndex.cu:192:\nGPU index only supports k <= 2048")

    on_gpu = SimpleNamespace(ntotal=5000, search=refuse)
    with pytest.raises(ValueError, match="^SEARCH.INDEX: faiss refuses it: .* k <= 2048$"):
        faiss_index.search(on_gpu, np.zeros((1, 8), np.float32), 3000)
    save(tmp_path, "images", some_features([str(i) for i in range(20)]))
    faiss_index.build(load_cfg(None, SEARCHED), tmp_path, "images")
    monkeypatch.setattr(faiss_index, "_gpus", lambda cfg: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuse, raising=False)
    with pytest.raises(ValueError, match="faiss: faiss cannot search it on a GPU: .* k <= 2048; set NUM_GPUS 0$"):
        faiss_index.read(load_cfg(None, SEARCHED), tmp_path, "images")


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("IVF8,Flat", "nonsense=3", "SEARCH.PARAMETERS nonsense=3: faiss refuses it"),
        ("IVF8,Flat", "nprobe=0", "faiss refuses it"),
        ("NSG8", "", "SEARCH.INDEX NSG8: faiss refuses it"),
        ("IDMap,Flat", "", "SEARCH.INDEX IDMap,Flat: faiss refuses it"),
    ],
)
def test_what_faiss_refuses_is_told_before_anything_is_built(tmp_path, monkeypatch, factory, parameters, message):
    pytest.importorskip("faiss")
    save(tmp_path, "images", some_features([str(i) for i in range(100)]))
    monkeypatch.setattr(faiss_index, "chunks", lambda vectors: pytest.fail("a build has begun"))
    cfg = load_cfg(None, ["SEARCH.INDEX", factory, "SEARCH.PARAMETERS", parameters, "NUM_GPUS", "0"])
    with pytest.raises(ValueError, match=message) as caught:
        faiss_index.build(cfg, tmp_path, "images")
    assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["images.json", "images.npy", "images.tsv"]


def test_an_index_is_there_before_its_recall_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    save(tmp_path, "images", some_features([str(i) for i in range(20)]))
    cfg = load_cfg(None, SEARCHED)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(faiss_index, "measure_recall", killed)
    with pytest.raises(KeyboardInterrupt):
        faiss_index.build(cfg, tmp_path, "images")
    assert faiss_index.read(cfg, tmp_path, "images").ntotal == 20
    save(tmp_path, "images", some_features([str(i) for i in range(20)], seed=1))
    monkeypatch.setattr(faiss_index, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        faiss_index.build(cfg, tmp_path, "images")
    with pytest.raises(FeaturesError, match="no index; build it"):  # not the new one under the old description
        faiss_index.read(cfg, tmp_path, "images")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"factory": [], "npy_sha256": {}, "sha256": 1}'])
def test_a_description_of_anything(tmp_path, content):
    pytest.importorskip("faiss")
    save(tmp_path, "images", some_features(["a"]))
    (tmp_path / "images.faiss.json").write_bytes(content)
    with pytest.raises(FeaturesError, match="not the description of an index"):
        faiss_index.read(load_cfg(None, SEARCHED), tmp_path, "images")


def test_a_broken_photograph_costs_no_other_its_results(extracted, capsys, tmp_path):
    root, _ = extracted
    (root / "asked").mkdir()
    for name in ("b.png", "c.png"):
        (root / "asked" / name).write_bytes((root / "photos" / "1" / "03.png").read_bytes())
    (root / "asked" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as caught:
        command(extracted, capsys, "--json", str(tmp_path / "f.json"), queries=("asked", "absent.png"))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out.count("1.0000  1/03.png") == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == [str(root / "asked/a.png"), str(root / "absent.png")]
    found = json.loads((tmp_path / "f.json").read_text())
    assert [one["query"] for one in found] == [str(root / "asked" / name) for name in ("b.png", "c.png")]
    (root / "empty").mkdir()
    with pytest.raises(SystemExit):
        command(extracted, capsys, queries=("empty",))
    assert "empty: no photographs in this folder" in capsys.readouterr().err


def test_results_are_written_before_they_are_printed(extracted, capsys, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "stdout")

    monkeypatch.setattr(neighbours, "print", full, raising=False)
    with pytest.raises(SystemExit):
        command(extracted, capsys, "--json", str(tmp_path / "f.json"))
    assert json.loads((tmp_path / "f.json").read_text())[0]["found"][0]["name"] == "1/03.png"


def test_images_are_added_with_their_names(tmp_path):
    one, two = some_features(["a", "b"]), some_features(["c", "d", "e"], seed=1, list_sha256="y")
    save(tmp_path / "one", "images", one)
    save(tmp_path / "two", "images", two)
    (tmp_path / "one" / "images.faiss").touch()
    assert indexing.add(tmp_path / "one", "images", tmp_path / "two") == 3
    whole = features.load(tmp_path / "one", "images")
    assert whole.names == ["a", "b", "c", "d", "e"]
    np.testing.assert_array_equal(whole.vectors, np.concatenate([one.vectors, two.vectors]))
    assert whole.provenance.list_sha256 == "x+y" and not (tmp_path / "one" / "images.faiss").exists()
    with pytest.raises(FeaturesError, match="c, d, e is in .* already; nothing is added"):
        indexing.add(tmp_path / "one", "images", tmp_path / "two")
    save(tmp_path / "other", "images", some_features(["f"], scales=[2.0]))
    with pytest.raises(FeaturesError, match="differ in scales; extract both"):
        indexing.add(tmp_path / "one", "images", tmp_path / "other")


def test_images_of_a_later_version_are_added_with_a_note(tmp_path, capsys):
    save(tmp_path / "one", "images", some_features(["a"], code_version="1"))
    save(tmp_path / "two", "images", some_features(["b"], code_version="2"))
    assert indexing.add(tmp_path / "one", "images", tmp_path / "two") == 1
    assert "differs in code_version" in capsys.readouterr().err


def test_faiss_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="SEARCH.INDEX needs faiss"):
        faiss_index.search_library()


def test_which_collection_a_place_means(tmp_path, monkeypatch):
    with pytest.raises(FeaturesError, match="no such folder"):
        find_collection(tmp_path / "absent")
    with pytest.raises(FeaturesError, match="no complete collection"):
        find_collection(tmp_path)
    save(tmp_path, "images", some_features(["a"]))
    assert find_collection(tmp_path) == find_collection(tmp_path / "images") == (tmp_path, "images")
    monkeypatch.chdir(tmp_path)
    assert find_collection(Path()) == (Path(), "images")
    with pytest.raises(FeaturesError, match="no complete collection"):
        find_collection(Path("/"))
    save(tmp_path, "database", some_features(["a"]))
    with pytest.raises(FeaturesError, match="holds images and database; name one of them"):
        find_collection(tmp_path)


def test_the_entry_files(tmp_path):
    (tmp_path / "c.yaml").touch()
    for name in ("search", "index"):
        line = [sys.executable, str(ROOT / "evaler" / f"{name}.py"), "--cfg", "c.yaml", "absent"]
        line += ["q.jpg"] if name == "search" else ["SEARCH.INDEX", "Flat"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=child_environment(), timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error: absent: no such folder of descriptors")


@pytest.mark.parametrize("told", [None, True, 5, [1], {"a": []}, "x" * 5000, "\0"])
def test_provenance_that_names_no_file_of_weights(told):
    found = Features(
        ["a"], np.ones((1, 1), np.float32), np.ones((1, 2), np.int32), Provenance.from_json({"weights": told})
    )
    assert neighbours.with_weights_of(None, ["RNG_SEED", "2"], found).TEST.WEIGHTS == ""
