"""Search in Milvus: with the embedded edition for real, in files of its own. A cluster cannot be here."""

import importlib.util
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from core.config import load_cfg
from core.config_values import ConfigError
from evaler.features.provenance import Provenance
from evaler.features.store import Features, FeaturesError, save
from evaler.features.top_k import top_k
from evaler.indexing import milvus_index
from evaler.indexing.milvus_index import MilvusError, build, name_of, search
from tests.evaler.indexing.test_search import command, extracted, indexing  # noqa: F401 a fixture
from tests.small_run import script, start

INSTALLED = all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite"))
needs_milvus = pytest.mark.skipif(
    not INSTALLED, reason="NOT CHECKED WITH MILVUS: pip install -r requirements-milvus.txt, then run this again"
)
pytestmark = pytest.mark.milvus

KILLED = """
import os, signal, sys
from pathlib import Path
from pymilvus import MilvusClient
from evaler.indexing import milvus_index

milvus_index.CHUNK, milvus_index.BATCH = 100, 20
calls, insert = [], MilvusClient.insert

def killed(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return insert(self, *args, **kwargs)

MilvusClient.insert = killed
milvus_index.build(sys.argv[1], Path(sys.argv[2]), "images")
"""


def described(folder, count=330, seed=0, dim=16):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    save(
        folder, "images", Features([str(i) for i in range(count)], vectors, np.ones((count, 2), np.int32), Provenance())
    )
    return vectors


@needs_milvus
def test_what_is_found_is_what_exact_search_finds(tmp_path, monkeypatch):
    import pymilvus

    asked, search_at_once = [], pymilvus.MilvusClient.search

    def noted(self, name, *, data, limit, **more):
        asked.append((len(data), limit))
        return search_at_once(self, name, data=data, limit=limit, **more)

    monkeypatch.setattr(pymilvus.MilvusClient, "search", noted)
    monkeypatch.setattr(milvus_index, "ASKED", 3)
    monkeypatch.setattr(milvus_index, "ANSWERED", 400)
    vectors, uri = described(tmp_path / "my photos"), str(tmp_path / "a.db")
    name, count = build(uri, tmp_path / "my photos", "images")
    assert (
        count == 330 and name == name_of(tmp_path / "my photos", "images") and name.startswith("dolg_my_photos_images_")
    )
    for k in (1, 10, 1000):
        scores, rows = search(uri, tmp_path / "my photos", "images", vectors[:7], k)
        exact, expected = top_k(vectors[:7], vectors, k)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(scores, exact, atol=1e-6)
    assert asked == [(3, 1), (3, 1), (1, 1), (3, 10), (3, 10), (1, 10)] + 7 * [(1, 330)]
    assert build(uri, tmp_path / "my photos", "images") == (name, 330)  # nothing is doubled


@needs_milvus
def test_a_killed_insertion_is_refused_and_goes_on(tmp_path):
    vectors, uri = described(tmp_path / "set"), str(tmp_path / "a.db")
    child = start(script(tmp_path, KILLED), uri, str(tmp_path / "set"))
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(
        MilvusError, match=r"holds \d+ of 330 descriptors of .*insert it with evaler/index.py"
    ) as caught:
        search(uri, tmp_path / "set", "images", vectors[:1], 3)
    there = int(str(caught.value).split("holds ")[1].split()[0])
    assert there % 20 == 0 and 0 < there < 330
    assert build(uri, tmp_path / "set", "images")[1] == 330
    _, rows = search(uri, tmp_path / "set", "images", vectors, 330)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(330), (330, 1)))
    np.testing.assert_array_equal(rows[:, 0], np.arange(330))


@needs_milvus
def test_only_what_is_missing_is_sent(tmp_path, monkeypatch):
    import pymilvus

    described(tmp_path / "set")
    uri, sent = str(tmp_path / "a.db"), []
    monkeypatch.setattr(milvus_index, "CHUNK", 100)
    build(uri, tmp_path / "set", "images")
    name = name_of(tmp_path / "set", "images")
    with milvus_index._connected(uri) as client:
        client.delete(name, filter="row in [120, 121]")
    for how in ("insert", "upsert"):
        plain = getattr(pymilvus.MilvusClient, how)

        def counted(self, collection, rows, plain=plain, how=how):
            sent.extend((how, row["row"]) for row in rows)
            return plain(self, collection, rows)

        monkeypatch.setattr(pymilvus.MilvusClient, how, counted)
    assert build(uri, tmp_path / "set", "images") == (name, 330)
    assert sent == [("upsert", row) for row in range(100, 200)]


@needs_milvus
def test_other_descriptors_are_another_collection(tmp_path):
    uri = str(tmp_path / "a.db")
    described(tmp_path / "set")
    build(uri, tmp_path / "set", "images")
    vectors = described(tmp_path / "set", count=40, seed=1)
    with pytest.raises(MilvusError, match="does not hold this state of"):
        search(uri, tmp_path / "set", "images", vectors[:1], 3)
    assert build(uri, tmp_path / "set", "images")[1] == 40
    assert search(uri, tmp_path / "set", "images", vectors[:4], 1)[1][:, 0].tolist() == [0, 1, 2, 3]


@needs_milvus
@pytest.mark.parametrize(
    ("dim", "metric", "rows", "message"),
    [
        (16, "IP", range(1, 31), "holds 1 rows that are no images"),
        (16, "IP", range(-1, 29), "holds 1 rows that are no images"),
        (16, "IP", range(29, -1, -1), "its scores are not those of the descriptors here"),
        (8, "IP", range(30), "has not the fields row and vector of 16 numbers"),
        (16, "L2", range(30), "by the metric L2, not IP"),
    ],
)
def test_a_collection_is_not_believed_for_its_name(tmp_path, dim, metric, rows, message):
    """As another program, or a mistake, may have made it."""
    from pymilvus import DataType

    vectors, uri = described(tmp_path / "set", count=30), str(tmp_path / "a.db")
    name = name_of(tmp_path / "set", "images")
    with milvus_index._connected(uri) as client:
        schema = client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type=metric)
        client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
        client.insert(name, [{"row": row, "vector": vector[:dim]} for row, vector in zip(rows, vectors, strict=True)])
    with pytest.raises(ValueError, match=message) as caught:
        search(uri, tmp_path / "set", "images", vectors[:2], 3)
    assert "\n" not in str(caught.value) and "a.db" in str(caught.value)
    if "scores" not in message:
        with pytest.raises(MilvusError, match=message):
            build(uri, tmp_path / "set", "images")


@needs_milvus
def test_the_commands(extracted, capsys, tmp_path):  # noqa: F811
    uri = ["SEARCH.URI", str(tmp_path / "a.db")]
    with pytest.raises(SystemExit):
        command(extracted, capsys, *uri)
    assert "a.db: no such database; make it with evaler/index.py" in capsys.readouterr().err
    assert not (tmp_path / "a.db").exists()
    built, _ = command(extracted, capsys, *uri, main=indexing.main, queries=())
    assert "a.db: 12 descriptors in dolg_photos_images_" in built
    command(extracted, capsys, "--json", str(tmp_path / "exact.json"))
    command(extracted, capsys, "--json", str(tmp_path / "found.json"), *uri)
    exact, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "found"))
    assert [[entry["name"] for entry in one["found"]] for one in found] == [
        [entry["name"] for entry in one["found"]] for one in exact
    ]


@needs_milvus
@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:1", "Fail connecting to server on 127.0.0.1:1"),
        ("{}/file.db", "a file, and no database of the embedded Milvus"),
        ("{}/absent/a.db", "there is no folder"),
        ("{}/a.sqlite", "name a path that ends with .db, or a host"),
    ],
)
def test_a_database_that_is_none_is_one_line_within_seconds(extracted, capsys, tmp_path, uri, message):  # noqa: F811
    (tmp_path / "file.db").write_text("text")
    began = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        command(extracted, capsys, "SEARCH.URI", uri.format(tmp_path), main=indexing.main, queries=())
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: SEARCH.URI ") and message in line
    assert time.monotonic() - began < 40


@needs_milvus
def test_a_database_in_use(tmp_path):
    import pymilvus

    described(tmp_path / "set")
    uri = str(tmp_path / "a.db")
    holder = script(
        tmp_path,
        "import sys, time, pymilvus\nc = pymilvus.MilvusClient(sys.argv[1])\nprint(1, flush=True)\ntime.sleep(60)\n",
    )
    child = start(holder, uri)
    try:
        assert child.stdout.readline()
        with pytest.raises(MilvusError, match="is another process using it") as caught:
            build(uri, tmp_path / "set", "images")
        assert "\n" not in str(caught.value)
    finally:
        child.kill()
        child.communicate()
    assert pymilvus and build(uri, tmp_path / "set", "images")[1] == 330


def test_pymilvus_is_asked_for_in_one_line(monkeypatch, tmp_path):
    described(tmp_path / "set", count=3)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(MilvusError, match=r"needs pymilvus .*requirements-milvus.txt"):
        build(str(tmp_path / "a.db"), tmp_path / "set", "images")
    assert os.listdir(tmp_path) == ["set"]


def test_an_incomplete_set_is_refused(tmp_path):
    with pytest.raises(FeaturesError, match="no descriptors of 'images' here"):
        build(str(tmp_path / "a.db"), tmp_path, "images")


def test_two_ways_to_search_are_one_too_many():
    with pytest.raises(ConfigError, match="leave one empty"):
        load_cfg(None, ["SEARCH.URI", "a.db", "SEARCH.INDEX", "Flat"])
