"""Descriptors on disk: whole or absent, keyed by name, and carrying where they come from.

A collection is a set of images described in the same way (`queries`, `database`, `images`). It lies in one folder as
`total` shards, and a shard is three files:

    <collection>.<cut>-of-<total>.npy    float32 [n, D], one descriptor a row
    <collection>.<cut>-of-<total>.tsv    `name<TAB>width<TAB>height`, a row each; the size of the picture as described
    <collection>.<cut>-of-<total>.json   the manifest: provenance, counts, and the sha256 of the other two

The manifest is written last, so a shard that was cut off while it was written has none and is not taken for a whole
one. Nothing relies on the order of rows: whoever needs an order asks for it by name (`align`).

Provenance is a JSON object and is the same for every shard of a collection. `evaler/extract.py` decides what stands in
it; `LIST_KEYS` are the ones that describe the list of images and therefore differ between collections.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.environment import atomic_write, sha256_file

MANIFEST_FORMAT = 1
LIST_KEYS = ("list_sha256",)
ROWS_A_CHUNK = 1 << 16
NAMES_SHOWN = 3


class FeaturesError(ValueError):
    """Descriptors that cannot be used; the message is one line."""


@dataclass(frozen=True, eq=False)
class Features:
    """Descriptors of N images.

    vectors: float32 [N, D], possibly memory-mapped. sizes: int32 [N, 2], width and height in pixels of the decoded and
    cropped picture. provenance: JSON-able, e.g. weights_sha256, scales, crop_query, code_version, list_sha256.
    """

    names: list[str]
    vectors: np.ndarray
    sizes: np.ndarray
    provenance: dict


def shard_path(folder: str | os.PathLike, collection: str, cut: int, total: int, suffix: str = ".json") -> Path:
    """Path of a shard's `.npy`, `.tsv` or `.json`; the shard is complete if its `.json` exists."""
    assert re.fullmatch(r"[A-Za-z0-9_-]+", collection) and 1 <= cut <= total, (collection, cut, total)
    return Path(folder) / f"{collection}.{cut}-of-{total}{suffix}"


def save(folder: str | os.PathLike, collection: str, features: Features, *, cut: int = 1, total: int = 1) -> None:
    """Write one shard. A shard of the same name is replaced; a process killed meanwhile leaves no manifest.

    Raises `FeaturesError` for what `load` would refuse: names that are empty, doubled or hold a tab or a line break,
    wrong shapes or types, values that are not finite.
    """
    npy, tsv, manifest = (shard_path(folder, collection, cut, total, s) for s in (".npy", ".tsv", ".json"))
    _check(features, str(npy))
    rows = zip(features.names, features.sizes.tolist(), strict=True)
    table = "".join(f"{name}\t{width}\t{height}\n" for name, (width, height) in rows).encode()

    manifest.unlink(missing_ok=True)  # from here to the end the shard is incomplete
    with atomic_write(npy) as file:
        np.save(file, features.vectors, allow_pickle=False)
    with atomic_write(tsv) as file:
        file.write(table)
    description = {
        "format": MANIFEST_FORMAT,
        "collection": collection,
        "cut": cut,
        "total": total,
        "count": len(features.names),
        "dim": features.vectors.shape[1],
        "dtype": "float32",
        "sha256": {"npy": sha256_file(npy), "tsv": sha256_file(tsv)},
        "provenance": features.provenance,
    }
    with atomic_write(manifest) as file:
        file.write(json.dumps(description, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")


def load_shard(folder: str | os.PathLike, collection: str, *, cut: int = 1, total: int = 1) -> Features:
    """Read one shard, its vectors memory-mapped.

    Raises `FeaturesError` if it has no manifest, if a file is not the one the manifest describes, or if its content
    is not usable.
    """
    npy, tsv, manifest = (shard_path(folder, collection, cut, total, s) for s in (".npy", ".tsv", ".json"))
    description = _read_manifest(manifest)
    for path, key in ((npy, "npy"), (tsv, "tsv")):
        if not path.is_file():
            raise FeaturesError(f"{path}: missing, though its manifest is there; extract this shard again")
        if sha256_file(path) != description["sha256"][key]:
            raise FeaturesError(f"{path}: is not the file its manifest describes (sha256); extract this shard again")
    try:
        vectors = np.lib.format.open_memmap(npy, mode="r")  # unlike np.load it reads no .npz and no pickle
    except (ValueError, OSError, EOFError) as error:
        raise FeaturesError(f"{npy}: not an array of numbers: {_one_line(error)}") from None
    expected = (description["count"], description["dim"])
    if vectors.shape != expected:
        raise FeaturesError(f"{npy}: not an array of shape {expected}, as its manifest says")
    names, sizes = _read_table(tsv)
    features = Features(names, vectors, sizes, description["provenance"])
    _check(features, str(npy))
    return features


def load(folder: str | os.PathLike, collection: str) -> Features:
    """Read all shards of a collection, joined in the order of their cuts.

    Raises `FeaturesError` if there are none, if a cut is absent, if the shards do not belong together (another total,
    dimension or provenance), if an image is in two of them, and for what `load_shard` refuses.
    """
    total = _find_total(Path(folder), collection)
    shards = [load_shard(folder, collection, cut=cut, total=total) for cut in range(1, total + 1)]
    first = shards[0]
    if total == 1:
        return first
    for cut, shard in enumerate(shards[1:], start=2):
        path = shard_path(folder, collection, cut, total)
        differing = differing_keys(first.provenance, shard.provenance)
        if differing:
            raise FeaturesError(
                f"{path}: differs from shard 1 in {', '.join(differing)}; extract all shards in the same way"
            )
        if shard.vectors.shape[1] != first.vectors.shape[1]:
            raise FeaturesError(
                f"{path}: dimension {shard.vectors.shape[1]}, shard 1 has {first.vectors.shape[1]}; "
                "extract all shards in the same way"
            )
    joined = Features(
        [name for shard in shards for name in shard.names],
        np.concatenate([shard.vectors for shard in shards]),
        np.concatenate([shard.sizes for shard in shards]),
        first.provenance,
    )
    _check_distinct(joined.names, f"{Path(folder) / collection}.*-of-{total}")
    return joined


def align(features: Features, names: Sequence[str], *, source: str) -> np.ndarray:
    """Return the vectors in the order of `names`: float32 [len(names), D].

    `source` says in messages where the features lie. Raises `FeaturesError` if the features have not exactly these
    names.
    """
    if list(names) == features.names:
        return features.vectors
    row = {name: index for index, name in enumerate(features.names)}
    missing = [name for name in names if name not in row]
    if missing:
        raise FeaturesError(f"{source}: no descriptor of {_some(missing)}, of {len(names)} asked for")
    surplus = sorted(set(row) - set(names))
    if surplus:
        raise FeaturesError(f"{source}: descriptors of {_some(surplus)} that were not asked for")
    return features.vectors[[row[name] for name in names]]


def differing_keys(a: dict, b: dict, *, but: Sequence[str] = ()) -> list[str]:
    """Keys of two provenances with different values, or in only one of them; those in `but` are not looked at."""
    absent = object()
    return sorted(key for key in a.keys() | b.keys() if key not in but and a.get(key, absent) != b.get(key, absent))


def chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows): a memory-mapped array is walked through without being read whole."""
    for start in range(0, len(vectors), ROWS_A_CHUNK):
        yield start, vectors[start : start + ROWS_A_CHUNK]


def _find_total(folder: Path, collection: str) -> int:
    pattern = re.compile(re.escape(collection) + r"\.([1-9]\d*)-of-([1-9]\d*)\.(npy|tsv|json)")
    entries = os.listdir(folder) if folder.is_dir() else []
    matches = [match for match in map(pattern.fullmatch, entries) if match]
    if not matches:
        raise FeaturesError(f"{folder}: no descriptors of '{collection}' here; extract them with evaler/infer.py first")
    totals = sorted({int(match[2]) for match in matches})
    if len(totals) > 1:
        found = " and ".join(f"*-of-{total}" for total in totals)
        raise FeaturesError(f"{folder}: '{collection}' has shards of different runs ({found}); delete the old ones")
    complete = {int(match[1]) for match in matches if match[3] == "json"}
    absent = [cut for cut in range(1, totals[0] + 1) if cut not in complete]
    if absent:
        raise FeaturesError(
            f"{folder}: '{collection}' lacks cut {_some(absent)} of {totals[0]} (no manifest); "
            f"extract with INFER.TOTAL_NUM {totals[0]} INFER.CUT_NUM {absent[0]}"
        )
    return totals[0]


def _read_manifest(path: Path) -> dict:
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FeaturesError(f"{path}: there is no manifest, the shard is incomplete; extract it again") from None
    except (OSError, ValueError) as error:
        raise FeaturesError(f"{path}: not a manifest: {_one_line(error)}; extract this shard again") from None
    types = {"format": int, "count": int, "dim": int, "sha256": dict, "provenance": dict}
    if type(description) is not dict or any(type(description.get(key)) is not types[key] for key in types):
        raise FeaturesError(f"{path}: not a manifest of descriptors; extract this shard again")
    if description["format"] != MANIFEST_FORMAT or set(description["sha256"]) != {"npy", "tsv"}:
        raise FeaturesError(f"{path}: format {description['format']}, this code reads format {MANIFEST_FORMAT}")
    return description


def _read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and int32 sizes [N, 2] of a `.tsv`."""
    names, sizes = [], []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise FeaturesError(f"{path}: not UTF-8 text; extract this shard again") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        fields = line.split("\t")
        if len(fields) != 3 or not all(re.fullmatch("[0-9]{1,9}", field) for field in fields[1:]):
            raise FeaturesError(f"{path} line {number}: not `name width height`; extract this shard again")
        names.append(fields[0])
        sizes.append((int(fields[1]), int(fields[2])))
    return names, np.array(sizes, dtype=np.int32).reshape(-1, 2)


def _check(features: Features, source: str) -> None:
    count = len(features.names)
    vectors, sizes = features.vectors, features.sizes
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] < 1:
        raise FeaturesError(f"{source}: {count} names need float32 [{count}, D], not {vectors.dtype} {vectors.shape}")
    if sizes.dtype != np.int32 or sizes.shape != (count, 2) or (sizes < 1).any():
        raise FeaturesError(f"{source}: {count} names need {count} picture sizes of at least 1 x 1 pixel")
    for name in features.names:
        if not name or re.search(r"[\t\n\r]", name) or not _is_utf8(name):
            raise FeaturesError(f"{source}: name {name!r} is empty, holds a tab or a line break, or is not UTF-8")
    _check_distinct(features.names, source)
    for start, rows in chunks(vectors):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise FeaturesError(f"{source}: the descriptor of {features.names[start + bad[0]]} is not finite")


def _check_distinct(names: Sequence[str], source: str) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        doubled = next(name for name in names if name in seen or seen.add(name))
        raise FeaturesError(f"{source}: {doubled} is there twice")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _some(items: Sequence) -> str:
    """`a, b, c and 5 more`"""
    shown = ", ".join(map(str, items[:NAMES_SHOWN]))
    return shown if len(items) <= NAMES_SHOWN else f"{shown} and {len(items) - NAMES_SHOWN} more"
