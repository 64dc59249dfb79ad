"""Manifests, plans and chunks with values of any type: read as they are, or refused in one line; nothing else."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.base.files import sha256_file
from core.base.json_files import MOST_DEPTH, parse
from evaler.extraction.chunks import chunk_path, read_chunk, read_header, read_plan, write_plan
from evaler.features.store import FeaturesError, feature_path, load, read_manifest, save
from tests.evaler.extraction.test_chunks import make_plan, write_all
from tests.evaler.features.test_features import make

ODD = [None, True, -1, 0, 3, 2**40, 2**70, 1.5, "", "x", "a\tb", "\ud800", "../..", [], [[]], [1], ["x"], [{}], {}]
ODD += [
    {"npy": 1, "tsv": []},
    {"a": [1]},
    [{"index": [], "name": 1, "reason": None}],
    [["x", 1, 2]],
    [[0, "a", "b", "c"]],
]
TEXTS = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"format": 2, "count": ' + b"9" * 5000 + b"}",
    b'{"format": NaN}',
    b'{"format": 1e999}',
    b'"\\ud800"',
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"\0" * 100,
    b"",
]


def one_line(call, *arguments) -> bool:
    """Whether it succeeds; if not, with one short line that names a file."""
    try:
        call(*arguments)
    except FeaturesError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and "/" in str(error)
        return False
    return True


def every_change(content: dict) -> list[dict]:
    return [content | {key: value} for key in content for value in ODD] + [
        {other: value for other, value in content.items() if other != key} for key in content
    ]


def test_manifests_of_other_values(tmp_path):
    save(tmp_path, "images", make(["a", "b"]))
    path = feature_path(tmp_path, "images")
    good = json.loads(path.read_text())
    changes = every_change(good)
    taken = 0
    for changed in changes:
        path.write_text(json.dumps(changed))
        if one_line(load, tmp_path, "images"):
            taken += 1
            found = read_manifest(tmp_path, "images")
            assert {key: found[key] for key in good if key not in ("provenance", "machines", "collection")} == {
                key: good[key] for key in good if key not in ("provenance", "machines", "collection")
            }
    assert 0 < taken < len(changes) / 4
    for text in TEXTS:
        path.write_bytes(text)
        assert not one_line(load, tmp_path, "images")
    path.unlink()
    os.mkfifo(path)
    assert not one_line(load, tmp_path, "images")


def test_plans_and_chunks_of_other_values(tmp_path):
    plan = make_plan()
    folder = write_all(tmp_path, plan)
    path = folder / "plan.json"
    for changed in every_change(json.loads(path.read_text())):
        # Under the name that its own digest gives, so that only the values can be what is wrong with it.
        try:
            named = type(plan)(**changed).folder(tmp_path)
            named.mkdir(exist_ok=True)
        except (TypeError, ValueError, OSError, AttributeError):
            named = folder
        (named / "plan.json").write_text(json.dumps(changed))
        if one_line(read_plan, named):
            assert read_plan(named).chunks <= 10**7
    for text in TEXTS:
        path.write_bytes(text)
        assert not one_line(read_plan, folder)
    path.unlink()
    write_plan(tmp_path, plan)
    path = chunk_path(folder, 1)
    line, _, body = path.read_bytes().partition(b"\n")
    for changed in every_change(json.loads(line)):
        path.write_bytes(json.dumps(changed).encode() + b"\n" + body)
        one_line(read_header, folder, plan, 1)
        if one_line(read_chunk, folder, plan, 1):
            assert read_chunk(folder, plan, 1).names == [f"folder/ä {i}.jpg" for i in range(4, 8)]
    for text in TEXTS:
        path.write_bytes(text + b"\n" + body)
        assert not one_line(read_chunk, folder, plan, 1)


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, -4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -4), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 4), }",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': '<f4,<f4', 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': 'x' * 9, 'fortran_order': False, 'shape': (2, 4), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': [2, 4], }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }",
    "{'descr': '<V0', 'fortran_order': False, 'shape': (2, 4), }",
    "(" * 5000,
    "[" * 9000 + "]" * 900,
    "-" * 9000 + "1",
    "{'a': b'''",
    "\\",
    "1" * 5000,
    "__import__('os').system('touch payload-was-run')",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_arrays(tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "images", make(["a", "b"]))
    npy, path = feature_path(tmp_path, "images", ".npy"), feature_path(tmp_path, "images")
    for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"):
        length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
        npy.write_bytes(b"\x93NUMPY" + version + length + header.encode() + np.ones(8, "<f4").tobytes())
        manifest = json.loads(path.read_text())
        manifest["sha256"]["npy"] = sha256_file(npy)
        path.write_text(json.dumps(manifest))
        tracemalloc.start()
        loaded = one_line(load, tmp_path, "images")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()
        assert loaded == (header == HEADERS[0] and version[0] < 4)
    assert not (tmp_path / "payload-was-run").exists()


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text('[]{}:,"\\u0d8aeE1-+.NI infty', max_size=60).map(str.encode))
def test_parse_gives_what_json_gives_or_refuses(data):
    try:
        value = parse(data)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert value == json.loads(data)
    json.dumps(value, allow_nan=False).encode()


def test_depth():
    for depth, refused in ((MOST_DEPTH, False), (MOST_DEPTH + 1, True), (400, True), (10**6, True)):
        text = b"[" * (depth - 1) + b"1" + b"]" * (depth - 1)
        if refused:
            with pytest.raises(ValueError, match="nested too deeply"):
                parse(text)
        else:
            parse(text)
