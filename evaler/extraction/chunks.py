"""The work of an extraction on disk, a chunk at a time: what is written stays, whoever is killed.

A chunk is a fixed slice of the list of images, whatever the number of shards: chunk i holds images i C to
(i + 1) C - 1, and shard c of n takes the chunks whose number modulo n is c - 1. While a collection is extracted, its
chunks lie in

    <collection>.chunks-<digest>/plan.json       what is extracted, how, and from which list (`Plan`)
    <collection>.chunks-<digest>/000012.chunk    a line of JSON, then records, the table of names and sizes, the vectors
    <collection>.chunks-<digest>/000013.changed  a chunk of which an image has changed since, until it is made again

The digest is that of the plan, so the work of another extraction (other weights, scales, list) lies in another folder.
Every chunk repeats it and carries the sha256 of its content. `evaler/extraction/join.py` makes one collection of them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.base.files import atomic_write
from core.base.json_files import parse, read_bytes, write_json
from evaler.features.identity import RECORD_BYTES
from evaler.features.provenance import Provenance, Purpose
from evaler.features.store import (
    DTYPES,
    Features,
    FeaturesError,
    Rejected,
    are_indices,
    parse_table,
    records_of,
    table_bytes,
)

CHUNK_FORMAT = 2
MOST_HEADER_BYTES = 2**26  # reasons of rejected images stand in it
MOST_CHUNKS = 10**7
MOST_CHUNK_BYTES = 2**36
_NAME = re.compile(r"([0-9]{6,12})\.(chunk|changed)")


@dataclass(frozen=True)
class Plan:
    """What is extracted: which images, in which chunks, how."""

    collection: str
    images: int
    chunk_size: int
    names_sha256: str  # of `name_lines` of all names in their order
    dtype: str  # of the collection that the chunks become; they are float32
    provenance: Provenance

    def to_json(self) -> dict:
        """What stands in `plan.json`."""
        return vars(self) | {"provenance": self.provenance.to_json()}

    @property
    def digest(self) -> str:
        """Tells two extractions apart: 64 hexadecimal digits."""
        content = self.to_json() | {
            "format": CHUNK_FORMAT,
            "provenance": self.provenance.relevant(Purpose.SAME_COLLECTION).to_json(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.images // self.chunk_size)

    def rows(self, number: int) -> range:
        """The images of a chunk, as indices of the list."""
        assert 0 <= number < self.chunks, (number, self.chunks)
        return range(number * self.chunk_size, min((number + 1) * self.chunk_size, self.images))

    def shard(self, cut: int, total: int) -> range:
        """The chunks of shard `cut` (from 1) of `total`."""
        return range(cut - 1, self.chunks, total)

    def folder(self, parent: str | os.PathLike) -> Path:
        """Where the chunks lie."""
        return Path(parent) / f"{self.collection}.chunks-{self.digest[:12]}"


def name_lines(names: Iterable[str]) -> bytes:
    """What `Plan.names_sha256` is the sha256 of."""
    return "".join(f"{name}\n" for name in names).encode()


def write_plan(parent: str | os.PathLike, plan: Plan) -> Path:
    """Make the folder of the chunks with its plan, unless it is there; return it."""
    folder = plan.folder(parent)
    if not (folder / "plan.json").exists():
        write_json(folder / "plan.json", plan.to_json(), sort_keys=True)
    return folder


def read_plan(folder: Path) -> Plan:
    """Raises `FeaturesError` for a folder whose plan is absent, no plan, or not the one the folder is named for."""
    path = folder / "plan.json"
    try:
        content: Any = parse(read_bytes(path, MOST_HEADER_BYTES))
        plan = Plan(**content | {"provenance": Provenance.from_json(content["provenance"])})
        fitting = _is_plan(plan) and folder.name == plan.folder(folder.parent).name
    except FileNotFoundError:
        raise FeaturesError(f"{path}: missing; delete the folder {folder} and extract again") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        fitting = False
    if not fitting:
        raise FeaturesError(f"{path}: not the plan of this folder; delete the folder and extract again")
    return plan


def _is_plan(plan: Plan) -> bool:
    types = {"collection": str, "images": int, "chunk_size": int, "names_sha256": str, "dtype": str}
    return (
        all(type(getattr(plan, key)) is kind for key, kind in types.items())
        and re.fullmatch(r"[A-Za-z0-9_-]+", plan.collection) is not None
        and plan.dtype in DTYPES
        and plan.images >= 0
        and plan.chunk_size >= 1
        and plan.chunks <= MOST_CHUNKS
    )


def plans(parent: str | os.PathLike) -> Iterator[Path]:
    """The folders of chunks in the folder of a set, sorted."""
    yield from sorted(path for path in Path(parent).glob("*.chunks-*") if path.is_dir())


def present(folder: Path, *, aside: bool = False) -> set[int]:
    """The numbers of the chunks that are there, or of those that are set aside."""
    try:
        matches = filter(None, map(_NAME.fullmatch, os.listdir(folder)))
        return {int(match[1]) for match in matches if (match[2] == "changed") == aside}
    except FileNotFoundError:
        return set()


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.chunk"


def write_chunk(folder: Path, plan: Plan, number: int, content: Features) -> None:
    """Write one chunk whole. Raises `FeaturesError` for a descriptor that is not of length 1, naming the image."""
    norms = np.linalg.norm(content.vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(bad):
        name, norm = content.names[bad[0]], norms[bad[0]]
        raise FeaturesError(f"{name}: its descriptor has length {norm:.4g}, not 1; INFER.PRECISION fp32 may mend it")
    table, records = table_bytes(content.names, content.sizes), records_of(content).tobytes()
    body = records + table + np.ascontiguousarray(content.vectors, "<f4").tobytes()
    header = {
        "format": CHUNK_FORMAT,
        "plan": plan.digest,
        "chunk": number,
        "count": len(content.names),
        "dim": content.vectors.shape[1],
        "table": len(table),
        "sha256": hashlib.sha256(body).hexdigest(),
        "machines": content.machines,
        "rejected": [list(rejection) for rejection in content.rejected],
    }
    with atomic_write(chunk_path(folder, number)) as file:
        file.write(json.dumps(header, sort_keys=True).encode() + b"\n" + body)


def read_header(folder: Path, plan: Plan, number: int) -> dict:
    """What stands in the first line of a chunk. Raises `FeaturesError` as `read_chunk` does."""
    path = chunk_path(folder, number)
    try:
        with open(path, "rb") as file:
            return _header(path, plan, number, file.readline(MOST_HEADER_BYTES))
    except OSError as error:
        raise FeaturesError(f"{path}: cannot be read: {error.strerror}") from None


def read_chunk(folder: Path, plan: Plan, number: int, *, aside: bool = False) -> Features:
    """Read a chunk, or what was set aside of it.

    Raises `FeaturesError` naming a file that is missing, damaged, or of another extraction.
    """
    path = (aside_path if aside else chunk_path)(folder, number)
    try:
        line, _, body = read_bytes(path, MOST_CHUNK_BYTES).partition(b"\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FeaturesError(f"{path}: cannot be read: {reason}") from None
    header = _header(path, plan, number, line)
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise FeaturesError(f"{path}: damaged (sha256); delete it and run the extraction again")
    start = RECORD_BYTES * len(plan.rows(number))  # of the table
    if len(body) != start + header["table"] + 4 * header["count"] * header["dim"]:
        raise FeaturesError(f"{path}: not a chunk of descriptors; delete it and run the extraction again")
    names, sizes = parse_table(body[start : start + header["table"]], str(path))
    vectors = np.frombuffer(body, "<f4", offset=start + header["table"]).reshape(header["count"], header["dim"])
    if len(names) != header["count"]:
        raise FeaturesError(f"{path}: not a chunk of descriptors; delete it and run the extraction again")
    rejected = [Rejected(*entry) for entry in header["rejected"]]
    records = np.frombuffer(body, np.uint8, count=start).reshape(-1, RECORD_BYTES)
    return Features(names, vectors, sizes, plan.provenance, rejected, header["machines"], records)


def read_records(folder: Path, plan: Plan, number: int) -> np.ndarray:
    """Those of a chunk, uint8 [n, 48], unchecked. Raises `FeaturesError` for what is no chunk of this plan."""
    path, count = chunk_path(folder, number), len(plan.rows(number))
    try:
        with open(path, "rb") as file:
            _header(path, plan, number, file.readline(MOST_HEADER_BYTES))
            body = file.read(count * RECORD_BYTES)
    except OSError as error:
        raise FeaturesError(f"{path}: cannot be read: {error.strerror}") from None
    return np.frombuffer(body.ljust(count * RECORD_BYTES, b"\0"), np.uint8).reshape(count, RECORD_BYTES)


def set_aside(folder: Path, number: int) -> None:
    """Let a chunk count as missing without losing what of it still holds."""
    chunk_path(folder, number).replace(aside_path(folder, number))


def aside_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.changed"


def _header(path: Path, plan: Plan, number: int, line: bytes) -> dict:
    try:
        header: Any = parse(line)
        stated = header["format"], header["plan"], header["chunk"]
    except (ValueError, TypeError, KeyError):
        raise FeaturesError(f"{path}: not a chunk of descriptors; delete it and run the extraction again") from None
    if stated != (CHUNK_FORMAT, plan.digest, number):
        raise FeaturesError(f"{path}: a chunk of another extraction; delete it and run the extraction again")
    if not _is_header(header, plan.rows(number)):
        raise FeaturesError(f"{path}: not a chunk of descriptors; delete it and run the extraction again")
    if header["count"] + len(header["rejected"]) != len(plan.rows(number)):
        raise FeaturesError(f"{path}: does not account for all of its images; delete it and run the extraction again")
    return header


def _is_header(header: dict, rows: range) -> bool:
    numbers = [header.get(key) for key in ("count", "dim", "table")]
    rejected, machines = header.get("rejected"), header.get("machines")
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and type(header.get("sha256")) is str
        and type(machines) is list
        and all(type(machine) is str for machine in machines)
        and type(rejected) is list
        and all(type(entry) is list and list(map(type, entry)) == [int, str, str] for entry in rejected)
        and are_indices([entry[0] for entry in rejected], rows)
    )
