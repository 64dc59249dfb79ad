"""Descriptors of earlier extractions that still hold: of the complete collection, and of chunks never joined."""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaler.extraction.chunks import Plan, plans, present, read_chunk, read_plan
from evaler.features.identity import IDENTITY_BYTES, Identities
from evaler.features.provenance import Provenance, Purpose
from evaler.features.store import Features, FeaturesError, check_length, load, read_manifest, read_records


def made_alike(provenance: Provenance, plan: Plan) -> bool:
    """Whether descriptors of this provenance are what the plan would make, but for the list of images."""
    return not provenance.differing(plan.provenance, Purpose.REUSABLE)


class Earlier:
    """Finds descriptors by name, and takes those whose images are the same.

    Settings, weights, dimension and version of the code are those of the plan; whatever is damaged is left aside.
    """

    def __init__(self, parent: Path, plan: Plan, *, dim: int, wanted: set[str]) -> None:
        """wanted: the names that will be asked for; the rest is not held."""
        sources = [*_complete(parent, plan), *_unfinished(parent, plan)]
        self._sources = [source for source in sources if source.hold(wanted, dim)]

    def same(
        self,
        indices: Sequence[int],
        names: Sequence[str],
        identities: Identities,
        fits: Callable[[int, int, int], bool],
    ) -> "dict[int, Descriptor]":
        """Index -> what was made of it. names: of the indices; `fits(index, width, height)`: whether it may be used."""
        descriptors: dict[int, Descriptor] = {}
        for source in self._sources:
            asked = [
                (index, position)
                for index, name in zip(indices, names, strict=True)
                if index not in descriptors and (position := source.place.get(name)) is not None
            ]
            if not asked:
                continue
            records = source.records[[position for _, position in asked]]
            same = identities.same([index for index, _ in asked], records)
            for (index, position), holds in zip(asked, same.tolist(), strict=True):
                descriptor = Descriptor(source, position)
                if holds and fits(index, *descriptor.size):
                    descriptors[index] = descriptor
        return descriptors


class Descriptor:
    """One of an earlier extraction."""

    def __init__(self, source: "_Source", position: int) -> None:
        self._source, self._position = source, position

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture as decoded and cropped."""
        width, height = self._source.sizes[self._position].tolist()
        return width, height

    @property
    def identity(self) -> np.ndarray:
        """uint8 [32]."""
        return self._source.records[self._position, :IDENTITY_BYTES]

    @property
    def machines(self) -> list[str]:
        """What it may have been made on."""
        return self._source.part(self._position).machines

    def vector(self) -> np.ndarray:
        """float32 [D]."""
        return self._source.vector(self._position)


class _Source:
    """Parts (one collection, or the chunks of a folder) that are read again when a vector is asked for."""

    def __init__(
        self, parts: Iterable[tuple[int, int]], read: Callable[[int], Features], *, but_rounded: bool = False
    ) -> None:
        """parts: number of each, and the index of its first image in its list. but_rounded: take no descriptor that
        float16 holds exactly, which was taken over from such a collection."""
        self._but_rounded = but_rounded
        self._parts, self._read = list(parts), functools.lru_cache(maxsize=2)(read)
        self.place: dict[str, int] = {}  # name -> position in records and sizes

    def hold(self, wanted: set[str], dim: int) -> bool:
        """Look the wanted names up; False if there is nothing to take."""
        records, sizes, numbers, rows = [], [], [], []
        for number, first in self._parts:
            try:
                part = self._read(number)
            except FeaturesError as error:
                print(f"note: {error}", file=sys.stderr)
                continue
            if part.records is None or part.vectors.shape[1] != dim:
                continue
            described = np.delete(part.records, [entry.index - first for entry in part.rejected], axis=0)
            usable = described[:, :IDENTITY_BYTES].any(axis=1)
            if self._but_rounded:
                usable &= (part.vectors != part.vectors.astype(np.float16)).any(axis=1)
            taken = []
            for row in np.flatnonzero(usable).tolist():
                if (name := part.names[row]) in wanted and name not in self.place:
                    self.place[name] = len(self.place)
                    taken.append(row)
            records.append(described[taken])
            sizes.append(part.sizes[taken])
            rows += taken
            numbers += [number] * len(taken)
        if self.place:
            self.records, self.sizes = np.concatenate(records), np.concatenate(sizes)
            self._numbers, self._rows = np.array(numbers), np.array(rows)  # of a position: part, and its row there
        return bool(self.place)

    def part(self, position: int) -> Features:
        return self._read(int(self._numbers[position]))

    def vector(self, position: int) -> np.ndarray:
        return np.asarray(self.part(position).vectors[self._rows[position]], dtype=np.float32)


def _complete(parent: Path, plan: Plan) -> Iterable[_Source]:
    try:
        manifest = read_manifest(parent, plan.collection)
        if not made_alike(manifest["provenance"], plan):
            return
        features = load(parent, plan.collection)
        if features.dtype == "float16" and plan.dtype == "float32":  # rounded already
            return
        check_length(features, f"{parent}: {plan.collection}")
    except FeaturesError:
        return  # absent or damaged: nothing of it can be used
    records = read_records(parent, plan.collection, manifest)
    if records is not None:
        whole = replace(features, records=records)
        yield _Source([(0, 0)], lambda number: whole)


def _unfinished(parent: Path, plan: Plan) -> Iterable[_Source]:
    current = plan.folder(parent)
    for folder in plans(parent):
        if not folder.name.startswith(f"{plan.collection}.chunks-"):
            continue
        try:
            other = read_plan(folder)
        except FeaturesError:
            continue  # the extraction tells of it
        if other.collection != plan.collection or not made_alike(other.provenance, plan):
            continue
        for aside in (False, True):
            numbers = sorted(number for number in present(folder, aside=aside) if number < other.chunks)
            if numbers and (aside or folder != current):
                read = functools.partial(_read_part, folder, other, aside)
                rounded = other.dtype == "float16" and plan.dtype == "float32"
                yield _Source([(number, other.rows(number).start) for number in numbers], read, but_rounded=rounded)


def _read_part(folder: Path, plan: Plan, aside: bool, number: int) -> Features:
    return read_chunk(folder, plan, number, aside=aside)


def superseded(parent: Path, plan: Plan, names: Sequence[str]) -> list[Path]:
    """Folders of chunks of former lists whose descriptors are all in the collection, which is complete now."""
    records = read_records(parent, plan.collection, read_manifest(parent, plan.collection))
    if records is None:
        return []
    row = {name: index for index, name in enumerate(names)}
    folders = []
    for folder in plans(parent):
        if folder == plan.folder(parent) or not folder.name.startswith(f"{plan.collection}.chunks-"):
            continue
        try:
            other = read_plan(folder)
            numbers = present(folder)
            if not numbers or not made_alike(other.provenance, plan) or plan.dtype not in (other.dtype, "float32"):
                continue
            if all(_all_there(read_chunk(folder, other, n), other.rows(n), row, records) for n in numbers):
                folders.append(folder)
        except FeaturesError:
            continue
    return folders


def _all_there(part: Features, rows: range, row: dict[str, int], records: np.ndarray) -> bool:
    """Whether a list (name -> row of its records) has all that is described in a chunk, made of the same bytes."""
    assert part.records is not None, "a chunk has them"
    described = np.delete(part.records, [entry.index - rows.start for entry in part.rejected], axis=0)
    there = [row.get(name, -1) for name in part.names]
    return -1 not in there and bool((records[there, :IDENTITY_BYTES] == described[:, :IDENTITY_BYTES]).all())
