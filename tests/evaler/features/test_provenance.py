"""Provenance: files of the version before it was a type, byte by byte, and what differs for each purpose."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest

from evaler.extraction.chunks import Plan, read_chunk, read_plan, write_chunk, write_plan
from evaler.features.provenance import Provenance, Purpose
from evaler.features.store import Features, Rejected, feature_path, load, save
from evaler.refinement import whitening

# As the version before wrote it, of a CPU; `json.dumps(..., sort_keys=True, indent=1)` of it stood in manifests.
CPU = """
 "provenance": {
  "batch_size": 1,
  "bn_eps": 1e-05,
  "code_version": "0123abc",
  "compiled": false,
  "crop_query": true,
  "depth": 50,
  "device": "CPU",
  "fusion": "orthogonal",
  "limits": [
   16,
   100.0,
   178956970
  ],
  "list_sha256": "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
  "max_level_pixels": 16777216,
  "precision": "fp32",
  "resize": "bilinear",
  "scales": [
   0.3535,
   0.5,
   0.7071,
   1.0,
   1.4142
  ],
  "stride_1x1": false,
  "threads": 2,
  "torch": "2.10.0+cpu",
  "weights": "/w/model_epoch_0100.pyth",
  "weights_sha256": "abababababababababababababababababababababababababababababababab",
  "with_ma": true
 }"""
GPU = (
    CPU.replace('"batch_size": 1', '"batch_size": 8')
    .replace('  "code', '  "chunk_size": 128,\n  "code')
    .replace('  "depth"', '  "decoder": "nvJPEG",\n  "depth"')
    .replace('"CPU"', '"GPU"')
    .replace("fp32", "bf16")
    .replace('  "threads": 2,\n', "")
)
# Keys that no version of ours knows, and a null.
FOREIGN = (
    CPU.replace('  "batch_size"', '  "Tiling": 1,\n  "batch_size"')
    .replace('  "torch"', '  "tiling": {\n   "at": [\n    1,\n    null\n   ],\n   "rows": 2\n  },\n  "torch"')
    .replace('"/w/model_epoch_0100.pyth"', "null")
)
MANIFEST = """{{
 "collection": "images",
 "count": 3,
 "dim": 3,
 "dtype": "float32",
 "format": 2,
 "images": 4,
 "machines": [
  "CPU (AVX2)"
 ],{provenance},
 "rejected": [
  {{
   "index": 3,
   "name": "c.jpg",
   "reason": "empty"
  }}
 ],
 "sha256": {{
  "npy": "924ed124d8f8b0d17853e83bb0bbeb833a78b05cee22cefb9076c86cd5f9eeb0",
  "tsv": "d70a39699bfef8f19989bd0f9c37337bc4055a8ac9f0f795c899c03667707ddd"
 }}
}}
"""
PLAN = """{{
 "chunk_size": 128,
 "collection": "images",
 "dtype": "float32",
 "images": 4,
 "names_sha256": "efefefefefefefefefefefefefefefefefefefefefefefefefefefefefefefef",{provenance}
}}
"""
DIGESTS = {  # of the plans, and the sha256 of their first chunks
    CPU: (
        "25346e5805e5823fe744ae00c65e5ed491b387cea491d75b1a8450663c018dfa",
        "2dc15834611b1eb281fb087e806a4508b4d6c3fc6d206a2d5f79c90ac59b8754",
    ),
    GPU: (
        "4a4aaa4876a9f57c8eef768ab74e4e249e76c0f2ede7c0ec589365140364ffb3",
        "e1619cdf26356f199020862e6812ee3bb5e8cf3dd72a3429030329617f2748e6",
    ),
    FOREIGN: (
        "d01dafdae449c8e1c15e3397056e596a873b9910f7ebfcec2a023ffb2ef806ee",
        "ac7db8e385d0ba2fc0f9fe8f2474a86f6edbd69ae99902b86a593cc239b2128c",
    ),
}
LEARNED_ON = (
    '{"collection": "images", "images": 3, "npy_sha256": '
    '"924ed124d8f8b0d17853e83bb0bbeb833a78b05cee22cefb9076c86cd5f9eeb0", "provenance": {"bn_eps": 1e-05, "depth": 50, '
    '"fusion": "orthogonal", "max_level_pixels": 16777216, "precision": "fp32", "resize": "bilinear", "scales": '
    '[0.3535, 0.5, 0.7071, 1.0, 1.4142], "stride_1x1": false, "weights_sha256": '
    '"abababababababababababababababababababababababababababababababab", "with_ma": true}, "set": "tiny"}'
)
every_text = pytest.mark.parametrize("text", [CPU, GPU, FOREIGN], ids=["cpu", "gpu", "foreign"])


def provenance(text=CPU):
    return Provenance.from_json(json.loads(f"{{{text}}}")["provenance"])


def features(text=CPU):
    vectors = np.array([[0.6, 0.8, 0], [0, 0.6, 0.8], [0.8, 0, 0.6]], np.float32)
    rejected = [Rejected(3, "c.jpg", "empty")]
    names, sizes = ["a/1.jpg", "a/2.jpg", "b/3.jpg"], np.full((3, 2), 9, np.int32)
    return Features(names, vectors, sizes, provenance(text), rejected, ["CPU (AVX2)"])


@every_text
def test_a_manifest_of_the_version_before_reads_and_is_written_again_byte_by_byte(tmp_path, text):
    save(tmp_path / "a", "images", features(text))
    path = feature_path(tmp_path / "a", "images")
    assert path.read_text() == MANIFEST.format(provenance=text)
    read = load(tmp_path / "a", "images")
    assert read.provenance == provenance(text)
    save(tmp_path / "b", "images", read)
    assert feature_path(tmp_path / "b", "images").read_bytes() == path.read_bytes()


@every_text
def test_so_do_plans_and_chunks(tmp_path, text):
    plan = Plan("images", 4, 128, "ef" * 32, "float32", provenance(text))
    folder = write_plan(tmp_path, plan)
    assert (folder / "plan.json").read_text() == PLAN.format(provenance=text)
    assert read_plan(folder) == plan
    write_chunk(folder, plan, 0, features(text))
    assert read_chunk(folder, plan, 0).provenance == plan.provenance
    written = hashlib.sha256((folder / "000000.chunk").read_bytes()).hexdigest()
    assert (plan.digest, written) == DIGESTS[text]


def test_so_does_a_whitening(tmp_path):
    save(tmp_path / "tiny", "images", features())
    whitening.main([str(tmp_path / "tiny"), str(tmp_path / "w.npz"), "--dim", "2"])
    assert np.load(tmp_path / "w.npz")["learned_on"].tobytes().decode() == LEARNED_ON
    learned_on = whitening.read(tmp_path / "w.npz").provenance
    assert learned_on.weights is None and learned_on.depth == 50
    assert learned_on.differing(provenance(GPU), Purpose.SAME_SPACE) == {
        "decoder": (None, "nvJPEG"),
        "precision": ("fp32", "bf16"),
    }


# What may differ, purpose by purpose, as it was listed before.
LISTS = {"list_sha256", "limits"}
MACHINES = {"weights", "device", "threads", "torch", "code_version", "compiled", "batch_size", "chunk_size"}
MAY_DIFFER = {
    Purpose.SAME_COLLECTION: {"weights"},
    Purpose.SAME_RUN: LISTS,
    Purpose.REUSABLE: {"weights", *LISTS},
    Purpose.ADDABLE: LISTS | MACHINES,
    Purpose.SAME_SPACE: LISTS | MACHINES | {"crop_query"},
    Purpose.SEARCHABLE: LISTS | MACHINES | {"crop_query", "precision", "decoder", "max_level_pixels"},
}


@pytest.mark.parametrize("purpose", Purpose)
def test_what_differs_for_a_purpose(purpose):
    known = [setting.name for setting in dataclasses.fields(Provenance) if setting.name != "other"]
    record = json.loads(f"{{{FOREIGN}}}")["provenance"]
    for key in (*known, "tiling"):
        for changed in (record | {key: "another"}, {name: value for name, value in record.items() if name != key}):
            one, other = Provenance.from_json(record), Provenance.from_json(changed)
            expected = (
                {} if key in MAY_DIFFER[purpose] or changed == record else {key: (record.get(key), changed.get(key))}
            )
            assert one.differing(other, purpose) == expected
            kept = {name: value for name, value in changed.items() if name not in MAY_DIFFER[purpose]}
            assert other.relevant(purpose).to_json() == kept
    assert purpose in MAY_DIFFER and one.differing(one, purpose) == {}


def test_what_has_another_type_is_kept_and_not_taken_for_the_setting():
    for key, value in {"weights": 5, "depth": True, "scales": ["x"], "bn_eps": None, "crop_query": 1}.items():
        odd = Provenance.from_json({key: value})
        assert getattr(odd, key) is None and odd.to_json() == {key: value}
        assert odd.differing(Provenance(), Purpose.SAME_RUN) == {key: (value, None)}


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        provenance().depth = 101


def test_no_module_spells_a_key_of_it():
    """Typed access alone: `provenance["weights"]` and `.get("weights")` went with the dictionary."""
    from tests.test_imports import our_sources

    spelt = re.compile(r"""provenance(\.get\(|\[)["']""")
    assert [path for path, source in our_sources().items() if path.startswith("evaler/") and spelt.search(source)] == []
