"""PCA whitening of descriptors: learned on one set, used on others.

Jegou and Chum, Negative evidences and co-occurences in image retrieval: the benefit of PCA and whitening, ECCV 2012.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.files import atomic_write
from core.base.json_files import parse, read_bytes
from evaler.features.places import find_collection
from evaler.features.provenance import Provenance, Purpose
from evaler.features.rows import Mapped
from evaler.features.store import (
    NPY_ERRORS,
    Features,
    FeaturesError,
    check_length,
    chunks,
    load,
    read_manifest,
)
from evaler.refinement.step import Step
from revisitop.scores import Rows

SMALLEST = 1e-9  # variance, of the largest one: directions with less hold rounding errors only
MOST_BYTES = 2**30
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)  # RuntimeError: encrypted, other compression
_ARRAYS = ("mean", "projection", "learned_on")


@dataclass(frozen=True, eq=False)
class Whitening:
    """mean: float64 [D]; projection: float64 [D, E], the columns in order of variance; learned_on: what and how."""

    mean: np.ndarray
    projection: np.ndarray
    learned_on: dict

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """float32 [N, D] -> float32 [N, E] of length 1."""
        moved = (rows.astype(np.float64) - self.mean) @ self.projection
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        return (moved / np.maximum(norms, 1e-12)).astype(np.float32)

    @property
    def provenance(self) -> Provenance:
        """Of the descriptors it was learned on, without what may differ from those it is used for."""
        return Provenance.from_json(self.learned_on.get("provenance", {}))

    @property
    def dim(self) -> int:
        return self.projection.shape[1]


@dataclass(frozen=True, eq=False)
class WhiteningStep(Step):
    """A `Whitening`, applied to rows as they are read."""

    whitening: Whitening

    @classmethod
    def of(cls, cfg: CfgNode) -> "WhiteningStep | None":
        """Raises `UserError` for a file that cannot be read."""
        return cls(read(Path(cfg.SCORE.WHITENING))) if cfg.SCORE.WHITENING else None

    def line(self, scored: Sequence[str]) -> str:
        origin = self.whitening.learned_on
        same = ", THE SCORED SET ITSELF" if origin.get("npy_sha256") in scored else ""
        return f"PCA whitening to {self.whitening.dim} (learned on {origin.get('set')}{same})"

    def check(self, database: Features) -> None:
        """Raise `FeaturesError` if the whitening was learned on descriptors that were made in another way."""
        dim = len(self.whitening.mean)
        differing = list(self.whitening.provenance.differing(database.provenance, Purpose.SAME_SPACE))
        if dim != database.vectors.shape[1]:
            differing.append(f"dimension, {dim} and {database.vectors.shape[1]}")
        if differing:
            what = ", ".join(differing)
            raise FeaturesError(f"SCORE.WHITENING was learned on descriptors made in another way (differs in {what})")

    def descriptors(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows]:
        whitened = self.whitening(np.asarray(queries, dtype=np.float32))
        return whitened, Mapped(database, self.whitening, self.whitening.dim)


def learn(vectors: np.ndarray, *, dim: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and projection [D, dim] (0: all) of descriptors [N, D], read in chunks.

    Raises UserError if the descriptors do not vary in so many directions.
    """
    count, full = vectors.shape
    sum_, products = np.zeros(full), np.zeros((full, full))
    for _, rows in chunks(vectors):
        rows = np.asarray(rows, dtype=np.float64)
        sum_ += rows.sum(axis=0)
        products += rows.T @ rows
    mean = sum_ / max(count, 1)
    values, directions = np.linalg.eigh(products / max(count, 1) - np.outer(mean, mean))
    values, directions = values[::-1], directions[:, ::-1]
    enough = int((values > SMALLEST * max(values[0], 1e-30)).sum())
    wanted = dim or full
    most = max(min(enough, count - 1), 0)
    if wanted > most:
        raise UserError(
            f"{count} descriptors vary in {most} directions, not {wanted}: use more images or a smaller --dim"
        )
    return mean, directions[:, :wanted] / np.sqrt(values[:wanted])


def write(path: Path, whitening: Whitening) -> None:
    origin = np.frombuffer(json.dumps(whitening.learned_on, sort_keys=True).encode(), np.uint8)
    with atomic_write(path) as file:
        np.savez(file, mean=whitening.mean, projection=whitening.projection, learned_on=origin)


def read(path: Path) -> Whitening:
    """Raises `UserError` naming a file that is missing, damaged or no whitening; nothing in it is executed."""
    try:
        return _parsed(read_bytes(path, MOST_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path}: no such whitening; evaler/whiten.py learns one") from None
    except (OSError, KeyError, IndexError, EOFError, AttributeError, MemoryError, *NPY_ERRORS, *_ZIP_ERRORS):
        raise UserError(f"{path}: not a whitening of evaler/whiten.py, or damaged; learn it again") from None


def _parsed(data: bytes) -> Whitening:
    """Of the content of a file. Raises what NumPy and zipfile do, and `UserError` for values of other kinds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if archive.testzip() is not None:  # NumPy does not look at the checksums
            raise UserError("damaged")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        mean, projection, origin = (file[key] for key in _ARRAYS)
    learned_on = parse(origin.tobytes())
    if not (mean.dtype == projection.dtype == np.float64 and mean.ndim == 1 and projection.ndim == 2):
        raise UserError("arrays of another kind")
    if not projection.shape[0] == len(mean) >= projection.shape[1] > 0:
        raise UserError("arrays of shapes that do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(projection).all()):
        raise UserError("not finite")
    if type(learned_on) is not dict or type(learned_on.get("provenance", {})) is not dict:
        raise UserError("does not tell what it was learned on")
    return Whitening(mean, projection, learned_on)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Learn PCA whitening on an extracted set; use it with SCORE.WHITENING.")
    parser.add_argument("learned_on", type=Path, metavar="SET", help="OUT_DIR/features/<set>, or <set>/<collection>")
    parser.add_argument("output", type=Path, metavar="OUT.npz", help="where to write it")
    parser.add_argument("--dim", type=int, default=0, help="dimensions to keep (default: all)")
    args = parser.parse_args(argv)
    if args.dim < 0 or args.output.suffix != ".npz":
        parser.error("--dim must be 0 or more, and OUT.npz end with .npz")
    folder, collection = find_collection(args.learned_on)
    features = load(folder, collection)
    check_length(features, f"{folder}: {collection}")
    mean, projection = learn(features.vectors, dim=args.dim)
    origin = {
        "set": folder.name,
        "collection": collection,
        "images": len(features.names),
        "npy_sha256": read_manifest(folder, collection)["sha256"]["npy"],
        "provenance": features.provenance.relevant(Purpose.SAME_SPACE).to_json(),
    }
    write(args.output, Whitening(mean, projection, origin))
    print(
        f"{args.output}: {projection.shape[1]} of {len(mean)} dimensions, by {len(features.names)} images of {folder}"
    )
