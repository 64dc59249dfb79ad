"""Chunks on disk, and the collection made of them: complete, in order, of one extraction, or refused by name."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from core.base.locks import InUse, folder_lock
from evaler.extraction import join as joining
from evaler.extraction.chunks import (
    Plan,
    chunk_path,
    plans,
    present,
    read_chunk,
    read_header,
    read_plan,
    write_chunk,
    write_plan,
)
from evaler.extraction.join import join, missing
from evaler.features.exports import export
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, Rejected, load, save
from tests.small_run import ROOT, child_environment, python

NAMES = [f"folder/ä {i}.jpg" for i in range(11)]
PROVENANCE = Provenance(weights="/a/b.pyth", weights_sha256="ab" * 32, scales=(0.5, 1.0), list_sha256="cd" * 32)


def make_plan(names=NAMES, **changes):
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    return dataclasses.replace(Plan("images", len(names), 4, digest, "float32", PROVENANCE), **changes)


def unit(count, seed=0, dim=6):
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def chunk(plan, number, *, broken=(), names=NAMES):
    """A chunk as the extraction makes it, with the images in `broken` (indices of the list) rejected."""
    rows = [index for index in plan.rows(number) if index not in broken]
    vectors = unit(len(names))[rows].reshape(-1, 6)
    sizes = np.array([(index + 1, 9) for index in rows], np.int32).reshape(-1, 2)
    rejected = [Rejected(index, names[index], "empty") for index in plan.rows(number) if index in broken]
    return Features([names[index] for index in rows], vectors, sizes, plan.provenance, rejected, ["CPU (x)"])


def write_all(parent, plan, *, but=(), **more):
    folder = write_plan(parent, plan)
    for number in range(plan.chunks):
        if number not in but:
            write_chunk(folder, plan, number, chunk(plan, number, **more))
    return folder


def refused(call, message, *args):
    with pytest.raises(FeaturesError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("images", "size", "total"), [(11, 4, 1), (11, 4, 2), (12, 4, 5), (1, 128, 3), (1000, 7, 8)])
def test_every_image_is_in_one_chunk_and_every_chunk_in_one_shard(images, size, total):
    plan = make_plan(images=images, chunk_size=size)
    shards = [list(plan.shard(cut, total)) for cut in range(1, total + 1)]
    assert sorted(number for shard in shards for number in shard) == list(range(plan.chunks))
    assert [index for number in range(plan.chunks) for index in plan.rows(number)] == list(range(images))


def test_the_digest_tells_extractions_apart_and_ignores_where_the_weights_lie():
    plan = make_plan()
    others = [
        make_plan(collection="queries"),
        make_plan(images=10),
        make_plan(chunk_size=5),
        make_plan(dtype="float16"),
        make_plan(NAMES[::-1]),
        make_plan(provenance=dataclasses.replace(PROVENANCE, scales=(1.0,))),
        make_plan(provenance=dataclasses.replace(PROVENANCE, weights_sha256="0")),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 8
    assert make_plan(provenance=dataclasses.replace(PROVENANCE, weights="elsewhere")).digest == plan.digest


def test_a_plan_is_written_once_and_read_again(tmp_path):
    plan = make_plan()
    folder = write_plan(tmp_path, plan)
    assert folder == plan.folder(tmp_path) and list(plans(tmp_path)) == [folder] and read_plan(folder) == plan
    before = (folder / "plan.json").stat().st_mtime_ns
    write_plan(tmp_path, plan)
    assert (folder / "plan.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"collection": 1}', None])
def test_plans_that_are_none(tmp_path, content):
    folder = write_plan(tmp_path, make_plan())
    if content is None:  # that of another extraction
        content = json.dumps(dataclasses.asdict(make_plan(chunk_size=5))).encode()
    (folder / "plan.json").write_bytes(content)
    refused(read_plan, "plan.json: not the plan of this folder; delete the folder", folder)
    (folder / "plan.json").unlink()
    refused(read_plan, "plan.json: missing; delete the folder", folder)


def test_what_is_written_is_read(tmp_path):
    plan = make_plan()
    folder = write_all(tmp_path, plan, broken={4, 6, 8, 9, 10})
    assert present(folder) == {0, 1, 2} and missing(folder, plan) == []
    for number in range(3):
        expected, found = chunk(plan, number, broken={4, 6, 8, 9, 10}), read_chunk(folder, plan, number)
        assert (found.names, found.rejected, found.machines) == (expected.names, expected.rejected, ["CPU (x)"])
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        np.testing.assert_array_equal(found.sizes, expected.sizes)
        assert read_header(folder, plan, number)["count"] == len(found.names)
    assert found.vectors.shape == (0, 6)  # of the last all are rejected


def test_a_chunk_is_whole_or_absent(tmp_path):
    """Killed at the rename."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.evaler.extraction.test_chunks import *\n"
        "plan = make_plan(); folder = write_plan(sys.argv[2], plan)\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_chunk(folder, plan, 1, chunk(plan, 1))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], env=child_environment(), timeout=60)
    assert result.returncode == -signal.SIGKILL
    plan = make_plan()
    folder = plan.folder(tmp_path)
    assert len(list(folder.iterdir())) == 2 and present(folder) == set()  # the plan and what nobody takes for a chunk
    write_all(tmp_path, plan)
    join(tmp_path, plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.json", "images.npy", "images.tsv"]


@pytest.mark.parametrize("value", [0.0, 2.0, np.nan, np.inf])
def test_a_descriptor_that_is_not_of_length_1_is_not_written(tmp_path, value):
    plan = make_plan()
    folder, content = write_plan(tmp_path, plan), chunk(plan, 0)
    content.vectors[2] *= value
    refused(write_chunk, "folder/ä 2.jpg: its descriptor has length (0|2|nan|inf), not 1", folder, plan, 0, content)
    assert present(folder) == set()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_joined_in_the_order_of_the_list(tmp_path, dtype):
    """Eleven chunks of one, so that an order by text would show."""
    plan = make_plan(chunk_size=1, dtype=dtype)
    write_all(tmp_path, plan, broken={3})
    join(tmp_path, plan)
    found, rows = load(tmp_path, "images"), [index for index in range(11) if index != 3]
    assert found.names == [NAMES[index] for index in rows] and found.provenance == PROVENANCE
    np.testing.assert_array_equal(found.vectors, unit(11)[rows].astype(dtype))
    assert found.sizes[:, 0].tolist() == [index + 1 for index in rows]
    assert found.rejected == [Rejected(3, NAMES[3], "empty")] and found.machines == ["CPU (x)"]
    assert not plan.folder(tmp_path).exists()


def test_the_chunk_size_does_not_show_in_the_result(tmp_path):
    for size in (1, 4, 100):
        plan = make_plan(chunk_size=size)
        write_all(tmp_path / str(size), plan)
        join(tmp_path / str(size), plan)
    for suffix in ("npy", "tsv", "json"):
        assert len({(tmp_path / str(size) / f"images.{suffix}").read_bytes() for size in (1, 4, 100)}) == 1


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (lambda folder: chunk_path(folder, 1).unlink(), "chunk 1 of 3 missing; run the extraction again"),
    "flipped bit": (lambda folder: corrupt(chunk_path(folder, 2)), r"000002\.chunk: damaged \(sha256\); delete it"),
    "empty": (lambda folder: chunk_path(folder, 0).write_bytes(b""), r"000000\.chunk: not a chunk of descriptors"),
    "text": (lambda folder: chunk_path(folder, 0).write_bytes(b"{}\n"), r"000000\.chunk: not a chunk of descriptors"),
    "under another number": (
        lambda folder: shutil.copy(chunk_path(folder, 0), chunk_path(folder, 1)),
        r"000001\.chunk: a chunk of another extraction",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_joined_is_named_and_nothing_is_written(tmp_path, damage):
    plan = make_plan()
    folder = write_all(tmp_path, plan)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    refused(join, message, tmp_path, plan)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("key", ["weights_sha256", "scales", "list_sha256"])
def test_a_chunk_of_another_extraction_is_named(tmp_path, key):
    plan, other = make_plan(), make_plan(provenance=Provenance.from_json(PROVENANCE.to_json() | {key: "other"}))
    folder = write_all(tmp_path, plan)
    foreign = write_all(tmp_path / "other", other)
    shutil.copy(chunk_path(foreign, 1), chunk_path(folder, 1))
    refused(join, r"000001\.chunk: a chunk of another extraction; delete it", tmp_path, plan)


def test_a_chunk_that_lacks_an_image_or_holds_another(tmp_path):
    plan = make_plan()
    folder = write_all(tmp_path, plan, but={1})
    content = chunk(plan, 1)
    short = Features(content.names[:-1], content.vectors[:-1], content.sizes[:-1], Provenance(), [], [])
    write_chunk(folder, plan, 1, short)
    refused(join, r"000001\.chunk: does not account for all of its images", tmp_path, plan)
    swapped = Features(content.names[::-1], content.vectors, content.sizes, Provenance(), [], [])
    write_chunk(folder, plan, 1, swapped)
    refused(join, "the chunks do not hold the list's names", tmp_path, plan)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_not_while_a_shard_is_at_work(tmp_path):
    plan = make_plan()
    folder = write_all(tmp_path, plan)
    with folder_lock(folder, shared=True), pytest.raises(InUse):
        join(tmp_path, plan)
    join(tmp_path, plan)


def test_killed_while_joining_it_can_be_done_again(tmp_path):
    plan = make_plan()
    write_all(tmp_path, plan)
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import evaler.extraction.join as j; from evaler.extraction.chunks import read_plan, plans\n"
        "j.discard = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "(folder,) = plans(sys.argv[2])\n"
        "j.join(folder.parent, read_plan(folder))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    assert subprocess.run(command, env=child_environment(), timeout=60).returncode == -signal.SIGKILL
    before = (tmp_path / "images.npy").read_bytes()
    join(tmp_path, plan)
    assert (tmp_path / "images.npy").read_bytes() == before and not list(plans(tmp_path))


def test_chunks_that_cannot_be_removed_stop_nothing(tmp_path, monkeypatch, capsys):
    """As on NFS, where a file that is still open stays as .nfs...: another run removes it."""

    def refuse(*_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    plan = make_plan()
    write_all(tmp_path, plan)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        join(tmp_path, plan)
    assert list(tmp_path.glob("*.joined-*")) and load(tmp_path, plan.collection).names == NAMES
    joining.discard(plan.folder(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    plan.folder(tmp_path).mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    joining.discard(plan.folder(tmp_path))
    assert "is not needed any more, but cannot be removed: Directory not empty" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    (tmp_path / "some.yaml").touch()
    features = tmp_path / "features" / "photos"

    def merge(*more):
        joining.main(["--cfg", str(tmp_path / "some.yaml"), "OUT_DIR", str(tmp_path), *more])

    def fails(*more):
        with pytest.raises(SystemExit) as raised:
            merge(*more)
        assert raised.value.code == 2
        return capsys.readouterr().err.strip()

    assert fails().startswith(f"error: {tmp_path}/features: nothing to join and nothing joined")
    write_all(features, make_plan(), but={0, 2})
    assert "chunk 0, 2 of 3 missing; run the extraction again to complete it" in fails()
    write_all(features, make_plan(), but={1})
    other = write_all(features, make_plan(chunk_size=5))
    assert "'images' was extracted in several ways (images.chunks-" in fails()
    shutil.rmtree(other)
    merge("INFER.EXPORT", "mat,npz")
    assert capsys.readouterr().out == "photos images: 11 descriptors, 0 images rejected\n"
    assert sorted(path.suffix for path in features.iterdir()) == [".json", ".mat", ".npy", ".npz", ".tsv"]
    result = python(ROOT / "evaler" / "merge.py", "--cfg", "some.yaml", "OUT_DIR", ".", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "photos images: 11 descriptors, 0 images rejected\n")


def test_exports_are_read_by_scipy_and_numpy_and_are_the_same_again(tmp_path):
    import scipy.io  # slow to load

    whole = Features(NAMES, unit(11), np.ones((11, 2), np.int32), Provenance())
    save(tmp_path, "images", whole)
    mat, npz = export(tmp_path, "images", ["mat", "npz"])
    np.testing.assert_array_equal(scipy.io.loadmat(mat)["X"], whole.vectors)
    with np.load(npz, allow_pickle=False) as found:
        assert list(found) == NAMES
        for name, vector in zip(NAMES, whole.vectors, strict=True):
            np.testing.assert_array_equal(found[name], vector)
    assert zipfile.ZipFile(npz).testzip() is None
    before = npz.read_bytes()
    export(tmp_path, "images", ["npz"])
    assert npz.read_bytes() == before


def test_more_than_a_mat_file_holds_is_refused(tmp_path, monkeypatch):
    save(tmp_path, "images", Features(NAMES, unit(11), np.ones((11, 2), np.int32), Provenance()))
    monkeypatch.setattr("evaler.features.exports._MOST_MAT_BYTES", 100)
    message = r"images\.mat: 11 descriptors are more than a \.mat holds \(2 GiB\); use npz"
    refused(export, message, tmp_path, "images", ["mat"])
    assert not (tmp_path / "images.mat").exists()
