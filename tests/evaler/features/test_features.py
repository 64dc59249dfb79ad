"""Descriptors on disk: what is written is read, and nothing that is not whole, fitting and finite is read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.base.files import sha256_file
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, Rejected, align, feature_path, load, save, write

ROOT = Path(__file__).resolve().parents[3]
PROVENANCE = {"weights_sha256": "ab" * 32, "scales": [0.5, 1.0], "crop_query": True, "list_sha256": "cd" * 32}


def make(names, dim=4, seed=0, **provenance):
    vectors = np.random.default_rng(seed).normal(size=(len(names), dim)).astype(np.float32)
    sizes = np.arange(1, 2 * len(names) + 1, dtype=np.int32).reshape(-1, 2)
    return Features(list(names), vectors, sizes, Provenance.from_json(PROVENANCE | provenance))


def forge(folder, collection, *, npy=None, tsv=None, **changes):
    """Rewrite parts of a collection so that its manifest agrees with them: only the later checks can object."""
    path = feature_path(folder, collection)
    manifest = json.loads(path.read_bytes())
    for content, suffix in ((npy, ".npy"), (tsv, ".tsv")):
        target = path.with_suffix(suffix)
        if isinstance(content, np.ndarray):
            np.save(target, content, allow_pickle=True)
        elif content is not None:
            target.write_bytes(content)
        manifest["sha256"][suffix[1:]] = sha256_file(target)
    manifest.update(changes)
    path.write_text(json.dumps(manifest))


def same(a, b):
    assert a.names == b.names
    assert a.provenance == b.provenance
    np.testing.assert_array_equal(a.vectors, b.vectors)
    np.testing.assert_array_equal(a.sizes, b.sizes)
    assert (a.vectors.dtype, a.sizes.dtype) == (np.float32, np.int32)


def refused(call, message, *args, **kwargs):
    with pytest.raises(FeaturesError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), min_size=1), unique=True)
)
def test_what_is_saved_is_loaded(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("features")
    save(folder, "images", make(names))
    same(load(folder, "images"), make(names))
    assert sorted(path.name for path in folder.iterdir()) == [f"images.{s}" for s in ("json", "npy", "tsv")]


def test_vectors_are_memory_mapped(tmp_path):
    save(tmp_path, "database", make(["a", "b"]))
    assert isinstance(load(tmp_path, "database").vectors, np.memmap)


def test_written_in_parts_it_is_the_same_file_as_whole(tmp_path):
    parts = [make([f"{part}-{i}" for i in range(part)], seed=part) for part in range(4)]
    parts[1] = Features(*list(vars(parts[1]).values())[:4], [Rejected(1, "x", "empty")], ["CPU b"])
    parts[2] = Features(*list(vars(parts[2]).values())[:4], [Rejected(5, "y", "a folder")], ["CPU a"])
    whole = Features(
        [name for part in parts for name in part.names],
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        parts[0].provenance,
        parts[1].rejected + parts[2].rejected,
        ["CPU b", "CPU a"],
    )
    write(tmp_path / "parts", "images", iter(parts), count=6, dim=4)
    save(tmp_path / "whole", "images", whole)
    for suffix in (".npy", ".tsv", ".json"):
        files = [feature_path(tmp_path / kind, "images", suffix).read_bytes() for kind in ("parts", "whole")]
        assert files[0] == files[1]
    np.save(tmp_path / "plain.npy", whole.vectors)
    assert (tmp_path / "plain.npy").read_bytes() == feature_path(tmp_path / "whole", "images", ".npy").read_bytes()
    found = load(tmp_path / "parts", "images")
    same(found, whole)
    assert found.rejected == whole.rejected and found.machines == ["CPU a", "CPU b"]
    manifest = json.loads(feature_path(tmp_path / "parts", "images").read_text())
    assert (manifest["images"], manifest["count"]) == (8, 6)


def test_half_precision(tmp_path):
    features = make(["a", "b", "c"])
    save(tmp_path, "images", features, dtype="float16")
    found = load(tmp_path, "images")
    assert found.dtype == "float16"
    np.testing.assert_array_equal(found.vectors, features.vectors.astype(np.float16))


def test_a_name_in_two_parts_leaves_nothing(tmp_path):
    refused(write, "a is there twice", tmp_path, "images", [make(["a"]), make(["b", "a"])], count=3, dim=4)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_it_is_written_leaves_the_old_one(tmp_path):
    save(tmp_path, "images", make(["a", "b"]))

    def parts():
        yield make(["c"])
        raise FeaturesError("no more")

    refused(write, "no more", tmp_path, "images", parts(), count=2, dim=4)
    same(load(tmp_path, "images"), make(["a", "b"]))


def test_a_collection_is_replaced(tmp_path):
    save(tmp_path, "queries", make(["a", "b"]))
    save(tmp_path, "queries", make(["c"], seed=1, crop_query=False))
    same(load(tmp_path, "queries"), make(["c"], seed=1, crop_query=False))


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_killed_process_leaves_the_old_collection_or_none(tmp_path, call):
    """Killed when a file is to be renamed or removed, over an older collection: half of the new one is never read."""
    save(tmp_path, "queries", make(["a", "b"]))
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np, evaler.features.store as f\n"
        "calls = 0\n"
        "def killing(function):\n"
        "    def run(*args, **kwargs):\n"
        "        global calls; calls += 1\n"
        "        if calls == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return function(*args, **kwargs)\n"
        "    return run\n"
        "os.replace, f.Path.unlink = killing(os.replace), killing(f.Path.unlink)\n"
        "one = np.ones((1, 4), np.float32)\n"
        "f.save(sys.argv[2], 'queries', f.Features(['z'], one, np.ones((1, 2), np.int32), f.Provenance()))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path), str(call)], timeout=60)
    if call == 5:  # there are four such calls
        assert result.returncode == 0 and load(tmp_path, "queries").names == ["z"]
        return
    assert result.returncode == -signal.SIGKILL
    if call == 1:
        same(load(tmp_path, "queries"), make(["a", "b"]))
    else:
        refused(load, "'queries' has no manifest, it is incomplete; extract it again", tmp_path, "queries")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (make(["a", "b", "a"]), "a is there twice"),
        (make(["a\tb"]), r"name 'a\\tb' is empty, holds a tab"),
        (make(["a\nb"]), r"name 'a\\nb' is empty, holds a tab"),
        (make([""]), "name '' is empty"),
        (make(["\udcff"]), "or is not UTF-8"),
        (
            Features(["a"], np.ones((1, 4)), np.ones((1, 2), np.int32), Provenance()),
            "need float32 or float16 .1, D., not float",
        ),
        (Features(["a"], np.ones((2, 4), np.float32), np.ones((1, 2), np.int32), Provenance()), "1 names need float32"),
        (Features(["a"], np.ones(1, np.float32), np.ones((1, 2), np.int32), Provenance()), "1 names need float32"),
        (Features(["a"], np.ones((1, 4), np.float32), np.ones((1, 2)), Provenance()), "1 names need 1 picture sizes"),
        (
            Features(["a"], np.ones((1, 4), np.float32), np.zeros((1, 2), np.int32), Provenance()),
            "at least 1 x 1 pixel",
        ),
        (
            Features(["a", "b"], np.float32([[1, 1], [1, np.nan]]), np.ones((2, 2), np.int32), Provenance()),
            "descriptor of b is not finite",
        ),
        (
            Features(["a"], np.float32([[1, np.inf]]), np.ones((1, 2), np.int32), Provenance()),
            "descriptor of a is not finite",
        ),
    ],
)
def test_unusable_features_are_not_saved(tmp_path, features, message):
    refused(save, message, tmp_path / "new", "queries", features)
    assert list((tmp_path / "new").iterdir()) == []


def test_absent_features(tmp_path):
    refused(load, "no descriptors of 'queries' here; extract them with evaler/infer.py", tmp_path / "no", "queries")
    save(tmp_path, "database", make(["a"]))
    refused(load, "no descriptors of 'queries' here", tmp_path, "queries")


@pytest.mark.parametrize("suffix", [".npy", ".tsv"])
def test_damaged_files(tmp_path, suffix):
    save(tmp_path, "queries", make(["a", "b"]))
    path = feature_path(tmp_path, "queries", suffix)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    refused(load, f"{suffix}: is not the file its manifest describes", tmp_path, "queries")
    path.write_bytes(content[:-3])
    refused(load, f"{suffix}: is not the file its manifest describes", tmp_path, "queries")
    path.unlink()
    refused(load, f"{suffix}: missing, though its manifest is there", tmp_path, "queries")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a manifest: Expecting value"),
        (b"\xff\xfe{", "not a manifest: "),
        (b"[1]", "not a manifest of descriptors"),
        (b'{"format": 2}', "not a manifest of descriptors"),
        (b'{"format": 2, "count": "2", "dim": 4, "sha256": {}, "provenance": {}}', "not a manifest of descriptors"),
        (b'{"format": 1, "count": 2, "dim": 4, "sha256": {}, "provenance": {}}', "format 1, this code reads format 2"),
    ],
)
def test_damaged_manifest(tmp_path, content, message):
    save(tmp_path, "queries", make(["a", "b"]))
    feature_path(tmp_path, "queries").write_bytes(content)
    refused(load, message, tmp_path, "queries")


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-was-run",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"npy": np.ones((2, 5), np.float32)}, r"not an array of shape \(2, 4\)"),
        ({"npy": np.ones((3, 4), np.float32)}, r"not an array of shape \(2, 4\)"),
        ({"npy": np.ones((3, 4), np.float32), "count": 3, "images": 3}, "2 names need float32"),
        ({"npy": np.ones((2, 4))}, "need float32"),
        ({"npy": np.float32([[1, 1, 1, 1], [1, np.inf, 1, 1]])}, "the descriptor of b is not finite"),
        ({"npy": np.full((2, 4), Payload(), object)}, "not an array of numbers: "),
        ({"npy": b"PK\x03\x04 not a zip"}, "not an array of numbers: "),
        ({"npy": b"\x93NUMPY\x01\x00"}, "not an array of numbers: "),
        ({"npy": b""}, "not an array of numbers: "),
        ({"tsv": b"a\t1\t2\n"}, "1 names need float32"),
        ({"tsv": b"a\t1\t2\na\t3\t4\n"}, "a is there twice"),
        ({"tsv": b"a\t1\t2\nb\t3\n"}, "tsv line 2: not `name width height`"),
        ({"tsv": b"a\t1\t2\nb\t3\tx\n"}, "tsv line 2: not `name width height`"),
        ({"tsv": b"a\t1\t2\nb\t3\t0\n"}, "at least 1 x 1 pixel"),
        ({"tsv": b"a\t1\t2\n\xff\t3\t4\n"}, "not UTF-8"),
    ],
)
def test_a_manifest_that_agrees_does_not_make_content_usable(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "queries", make(["a", "b"]))
    forge(tmp_path, "queries", **changes)
    refused(load, message, tmp_path, "queries")
    assert not Path("payload-was-run").exists()


def test_align_by_name():
    features = make(["a", "b", "c"])
    np.testing.assert_array_equal(align(features, ["c", "a", "b"], source="x"), features.vectors[[2, 0, 1]])
    assert align(features, ("a", "b", "c"), source="x") is features.vectors


def test_align_refuses_missing_and_surplus_names():
    features = make(["a", "b", "c"])
    refused(align, "here: no descriptor of d, of 4 asked for", features, list("abcd"), source="here")
    refused(align, "no descriptor of v, w, x and 2 more, of 6 asked for", features, list("avwxyz"), source="here")
    refused(align, "here: descriptors of b, c that were not asked for", features, ["a"], source="here")
