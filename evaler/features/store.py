"""Descriptors on disk: whole or absent, keyed by name, and carrying where they come from.

A collection is a set of images described in the same way (`queries`, `database`, `images`). It is three files in one
folder:

    <collection>.npy    float32 (or float16) [N, D], one descriptor a row
    <collection>.tsv    `name<TAB>width<TAB>height`, a row each; the size of the picture as decoded and cropped
    <collection>.json   the manifest: provenance, counts, rejected images, and the sha256 of the other two

Extraction adds <collection>.files, a record of `identity.py` for each image of the list, so that a later one can tell
which descriptors still hold. Nothing else reads it, and a collection is complete without.

The manifest is written last, so a collection that was cut off while it was written has none and is not taken for a
whole one. Rows stand in the order of the list that was extracted; whoever needs an order asks for it by name (`align`).

`provenance.py` says what the provenance is and compares it.
"""

import contextlib
import hashlib
import json
import os
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from core.base.errors import UserError
from core.base.files import atomic_write, sha256_file
from core.base.json_files import parse, read_bytes, write_json
from core.base.terminal import reason_of
from datasets.normalisation import note_on_name
from evaler.features.identity import RECORD_BYTES
from evaler.features.provenance import Provenance, Purpose

MANIFEST_FORMAT = 2
RECORDS_FORMAT = 1
DTYPES = ("float32", "float16")
ROWS_A_CHUNK = 1 << 16
NAMES_SHOWN = 3
# float32 normalisation is exact to 1e-7, half precision to 1e-3.
NORM_TOLERANCE = 2e-3
# What NumPy raises for damaged headers.
NPY_ERRORS = (
    *(ValueError, OSError, EOFError, TypeError, OverflowError, MemoryError),
    *(SyntaxError, RecursionError, tokenize.TokenError),
)
_MANIFEST_TYPES = {
    **{"format": int, "collection": str, "images": int, "count": int, "dim": int, "dtype": str},
    **{"sha256": dict, "rejected": list, "machines": list, "provenance": dict},
}


class FeaturesError(UserError):
    """Descriptors that cannot be used; the message is one line."""


class Rejected(NamedTuple):
    """An image that has no descriptor, and why."""

    index: int  # type: ignore[assignment]  # in the list that was extracted, from 0; hides a method of tuples
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Features:
    """Descriptors of N images.

    vectors: float32 or float16 [N, D], possibly memory-mapped. sizes: int32 [N, 2], width and height in pixels of the
    decoded and cropped picture.
    """

    names: list[str]
    vectors: np.ndarray
    sizes: np.ndarray
    provenance: Provenance
    rejected: list[Rejected] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)  # what they were made on
    records: np.ndarray | None = None  # uint8 [N + rejected, 48], in the order of the list: see `identity.py`

    @property
    def dtype(self) -> str:
        """float32 or float16."""
        return self.vectors.dtype.name


def feature_path(folder: str | os.PathLike, collection: str, suffix: str = ".json") -> Path:
    """Path of a collection's `.npy`, `.tsv` or `.json`; the collection is complete if its `.json` exists."""
    assert re.fullmatch(r"[A-Za-z0-9_-]+", collection), collection
    return Path(folder) / f"{collection}{suffix}"


def save(folder: str | os.PathLike, collection: str, features: Features, *, dtype: str = "float32") -> None:
    """Write a collection that is in memory; see `write`."""
    write(folder, collection, [features], count=len(features.names), dim=features.vectors.shape[-1], dtype=dtype)


def write(
    folder: str | os.PathLike,
    collection: str,
    parts: Iterable[Features],
    *,
    count: int,
    dim: int,
    dtype: str = "float32",
) -> None:
    """Write a collection in parts, one after another, so that it need not fit into memory.

    All parts have the same provenance and dimension; they have `count` rows together. A collection of the same name is
    replaced once all of the new one is written; a process killed meanwhile leaves the old one, or no manifest.
    Raises `FeaturesError` for what `load` would refuse: names that are empty, doubled or hold a tab or a line break,
    wrong shapes or types, values that are not finite.
    """
    assert dtype in DTYPES, dtype
    npy, tsv, manifest = (feature_path(folder, collection, s) for s in (".npy", ".tsv", ".json"))
    rejected: list[Rejected] = []
    machines: set[str] = set()
    seen: set[str] = set()
    provenance = Provenance()
    records: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        vectors, table = (_Hashed(stack.enter_context(atomic_write(path))) for path in (npy, tsv))
        np.lib.format.write_array_header_1_0(
            vectors, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, dim)}
        )
        for part in parts:
            _check(part, str(npy), seen)
            assert part.vectors.shape[1] == dim, (part.vectors.shape, dim)
            for _, rows in chunks(part.vectors):
                vectors.write(np.ascontiguousarray(rows, dtype).tobytes())
            table.write(table_bytes(part.names, part.sizes))
            rejected += part.rejected
            machines |= set(part.machines)
            provenance = part.provenance
            records.append(records_of(part))
        assert len(seen) == count, (len(seen), count)
        manifest.unlink(missing_ok=True)  # from here to the end the collection is incomplete
    description = {
        "format": MANIFEST_FORMAT,
        "collection": collection,
        "images": count + len(rejected),
        "count": count,
        "rejected": [rejection._asdict() for rejection in rejected],
        "dim": dim,
        "dtype": dtype,
        "sha256": {"npy": vectors.digest.hexdigest(), "tsv": table.digest.hexdigest()},
        "machines": sorted(machines),
        "provenance": provenance.to_json(),
    }
    write_records(folder, collection, description, np.concatenate(records) if records else None)
    write_json(manifest, description, sort_keys=True)


def records_of(part: Features) -> np.ndarray:
    """uint8 [N + rejected, 48], zeros where nothing is known."""
    if part.records is None:
        return np.zeros((len(part.names) + len(part.rejected), RECORD_BYTES), np.uint8)
    assert part.records.shape == (len(part.names) + len(part.rejected), RECORD_BYTES), part.records.shape
    return part.records


def write_records(folder: str | os.PathLike, collection: str, description: dict, records: np.ndarray | None) -> None:
    """Write `<collection>.files` for the collection of a manifest; remove it if nothing is known of any image."""
    path = feature_path(folder, collection, ".files")
    if records is None or not records.any():
        if path.exists():
            path.unlink()
        return
    body = records.tobytes()
    header = {"format": RECORDS_FORMAT, "of": description["sha256"], "sha256": hashlib.sha256(body).hexdigest()}
    with atomic_write(path) as file:
        file.write(json.dumps(header, sort_keys=True).encode() + b"\n" + body)


def read_records(folder: str | os.PathLike, collection: str, description: dict) -> np.ndarray | None:
    """uint8 [N + rejected, 48] of the collection of a manifest; None if there are none, or damaged ones."""
    try:
        line, _, body = feature_path(folder, collection, ".files").read_bytes().partition(b"\n")
    except OSError:
        return None
    expected = {"format": RECORDS_FORMAT, "of": description["sha256"], "sha256": hashlib.sha256(body).hexdigest()}
    count = description["count"] + len(description["rejected"])
    if line != json.dumps(expected, sort_keys=True).encode() or len(body) != count * RECORD_BYTES:
        return None
    return np.frombuffer(body, np.uint8).reshape(count, RECORD_BYTES)


def load(folder: str | os.PathLike, collection: str) -> Features:
    """Read a collection, its vectors memory-mapped.

    Raises `FeaturesError` if it is absent or has no manifest, if a file is not the one the manifest describes, or if
    its content is not usable.
    """
    npy, tsv = (feature_path(folder, collection, suffix) for suffix in (".npy", ".tsv"))
    description = read_manifest(folder, collection)
    for path, key in ((npy, "npy"), (tsv, "tsv")):
        if not path.is_file():
            raise FeaturesError(f"{path}: missing, though its manifest is there; extract it again")
        if sha256_file(path) != description["sha256"][key]:
            raise FeaturesError(f"{path}: is not the file its manifest describes (sha256); extract it again")
    try:
        vectors = np.lib.format.open_memmap(npy, mode="r")  # unlike np.load it reads no .npz and no pickle
    except NPY_ERRORS as error:
        raise FeaturesError(f"{npy}: not an array of numbers: {reason_of(error)}") from None
    if not (vectors.dtype.isnative and vectors.flags.c_contiguous):
        raise FeaturesError(f"{npy}: not in the order of bytes and rows of this machine; extract it again")
    expected = (description["count"], description["dim"])
    if vectors.shape != expected:
        raise FeaturesError(f"{npy}: not an array of shape {expected}, as its manifest says")
    names, sizes = parse_table(tsv.read_bytes(), str(tsv))
    rejected = [Rejected(**entry) for entry in description["rejected"]]
    features = Features(names, vectors, sizes, description["provenance"], rejected, description["machines"])
    _check(features, str(npy), set())
    return features


def read_manifest(folder: str | os.PathLike, collection: str) -> dict:
    """The manifest of a collection, `provenance` as a `Provenance`. Raises `FeaturesError` if it is absent or none."""
    path = feature_path(folder, collection)
    try:
        description = parse(read_bytes(path))
    except FileNotFoundError:
        raise FeaturesError(f"{folder}: {_absence(Path(folder), collection)}") from None
    except (OSError, ValueError) as error:
        raise FeaturesError(f"{path}: not a manifest: {reason_of(error)}; extract it again") from None
    if type(description) is dict and type(format := description.get("format")) is int and format != MANIFEST_FORMAT:
        raise FeaturesError(f"{path}: format {format}, this code reads format {MANIFEST_FORMAT}")
    if type(description) is not dict or not _is_manifest(description):
        raise FeaturesError(f"{path}: not a manifest of descriptors; extract it again")
    return description | {"provenance": Provenance.from_json(description["provenance"])}


def _is_manifest(description: object) -> bool:
    return (
        type(description) is dict
        and all(type(description.get(key)) is kind for key, kind in _MANIFEST_TYPES.items())
        and description["count"] >= 0
        and description["dim"] >= 1
        and description["dtype"] in DTYPES
        and set(description["sha256"]) == {"npy", "tsv"}
        and all(type(digest) is str for digest in description["sha256"].values())
        and all(type(machine) is str for machine in description["machines"])
        and all(map(_is_rejected, description["rejected"]))
        and description["images"] == description["count"] + len(description["rejected"])
        and are_indices([entry["index"] for entry in description["rejected"]], range(description["images"]))
    )


def _is_rejected(entry: object) -> bool:
    return (
        type(entry) is dict
        and set(entry) == set(Rejected._fields)
        and [type(entry[key]) for key in Rejected._fields] == [int, str, str]
    )


def are_indices(indices: Sequence[int], of: range) -> bool:
    """Whether all lie in a range, each once."""
    return len(set(indices)) == len(indices) and all(of.start <= index < of.stop for index in indices)


def _absence(folder: Path, collection: str) -> str:
    started = list(folder.glob(f"{collection}.chunks-*")) if folder.is_dir() else []
    if started:
        return f"the extraction of '{collection}' is unfinished; run it again to complete it"
    if any(feature_path(folder, collection, suffix).exists() for suffix in (".npy", ".tsv")):
        return f"'{collection}' has no manifest, it is incomplete; extract it again"
    return f"no descriptors of '{collection}' here; extract them with evaler/infer.py first"


def align(features: Features, names: Sequence[str], *, source: str) -> np.ndarray:
    """Return the vectors in the order of `names`: [len(names), D].

    `source` says in messages where the features lie. Raises `FeaturesError` if the features have not exactly these
    names.
    """
    if list(names) == features.names:
        return features.vectors
    row = {name: index for index, name in enumerate(features.names)}
    missing = [name for name in names if name not in row]
    if missing:
        note = note_on_name(missing[0], row)
        raise FeaturesError(f"{source}: no descriptor of {some(missing)}, of {len(names)} asked for{note}")
    surplus = sorted(set(row) - set(names))
    if surplus:
        raise FeaturesError(f"{source}: descriptors of {some(surplus)} that were not asked for")
    return features.vectors[[row[name] for name in names]]


def check_alike(one_name: str, one: Features, other_name: str, other: Features, purpose: Purpose) -> None:
    """Raise `FeaturesError` for descriptors of two dimensions, or that were made in ways which a purpose forbids."""
    keys = list(one.provenance.differing(other.provenance, purpose))
    if one.vectors.shape[1] != other.vectors.shape[1]:
        keys.append(f"dimension ({one.vectors.shape[1]} and {other.vectors.shape[1]})")
    if keys:
        raise FeaturesError(f"{one_name} and {other_name} differ in {', '.join(keys)}; extract both in the same way")


def check_length(features: Features, source: str) -> None:
    """Raise `FeaturesError` for a descriptor that is not of length 1, naming the image."""
    for start, rows in chunks(features.vectors):
        rows = np.asarray(rows, dtype=np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        bad = np.flatnonzero(np.abs(norms - 1) > NORM_TOLERANCE)
        if len(bad):
            name, norm = features.names[start + bad[0]], norms[bad[0]]
            what = "is zero" if norm == 0 else f"has length {norm:.4g}, not 1"
            raise FeaturesError(f"{source}: the descriptor of {name} {what} (one of {len(bad)}); extract it again")


def chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows): a memory-mapped array is walked through without being read whole."""
    for start in range(0, len(vectors), ROWS_A_CHUNK):
        yield start, vectors[start : start + ROWS_A_CHUNK]


def table_bytes(names: Sequence[str], sizes: np.ndarray) -> bytes:
    """Names and sizes [N, 2] as the lines of a `.tsv`."""
    rows = zip(names, sizes.tolist(), strict=True)
    return "".join(f"{name}\t{width}\t{height}\n" for name, (width, height) in rows).encode()


def parse_table(data: bytes, source: str) -> tuple[list[str], np.ndarray]:
    """Names and int32 sizes [N, 2] of a `.tsv`."""
    names, sizes = [], []
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise FeaturesError(f"{source}: not UTF-8 text; extract it again") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        fields = line.split("\t")
        if len(fields) != 3 or not all(re.fullmatch("[0-9]{1,9}", field) for field in fields[1:]):
            raise FeaturesError(f"{source} line {number}: not `name width height`; extract it again")
        names.append(fields[0])
        sizes.append((int(fields[1]), int(fields[2])))
    return names, np.array(sizes, dtype=np.int32).reshape(-1, 2)


def some(items: Sequence) -> str:
    """`a, b, c and 5 more`"""
    shown = ", ".join(map(str, items[:NAMES_SHOWN]))
    return shown if len(items) <= NAMES_SHOWN else f"{shown} and {len(items) - NAMES_SHOWN} more"


class _Hashed:
    """Writes to a file and knows the sha256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self._file.write(data)


def _check(features: Features, source: str, seen: set[str]) -> None:
    """Raise `FeaturesError` for what cannot be used; names are put into `seen`, which none of them may be in."""
    count = len(features.names)
    vectors, sizes = features.vectors, features.sizes
    if vectors.dtype.name not in DTYPES or vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] < 1:
        actual = f"{vectors.dtype} {vectors.shape}"
        raise FeaturesError(f"{source}: {count} names need float32 or float16 [{count}, D], not {actual}")
    if sizes.dtype != np.int32 or sizes.shape != (count, 2) or (sizes < 1).any():
        raise FeaturesError(f"{source}: {count} names need {count} picture sizes of at least 1 x 1 pixel")
    for name in features.names:
        if not name or re.search(r"[\t\n\r]", name) or not _is_utf8(name):
            raise FeaturesError(f"{source}: name {name!r} is empty, holds a tab or a line break, or is not UTF-8")
        if name in seen:
            raise FeaturesError(f"{source}: {name} is there twice")
        seen.add(name)
    for start, rows in chunks(vectors):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise FeaturesError(f"{source}: the descriptor of {features.names[start + bad[0]]} is not finite")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
