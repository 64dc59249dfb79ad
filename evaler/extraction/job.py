"""One collection to extract: what of it is there, what is left, and how its chunks are made."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from core.base.locks import InUse, folder_lock
from core.base.progress import Counter
from datasets.images.decode import ImageError
from evaler.extraction.chunks import (
    Plan,
    name_lines,
    plans,
    present,
    read_header,
    read_plan,
    set_aside,
    write_chunk,
    write_plan,
)
from evaler.extraction.chunks import read_records as read_records_of_chunk
from evaler.extraction.earlier import Descriptor, Earlier, made_alike, superseded
from evaler.extraction.gpu_jpeg import nvjpeg
from evaler.extraction.join import discard, join, missing
from evaler.extraction.multiscale import describe_batch
from evaler.extraction.pictures import Broken, Limits, Picture, Pictures, by_size, decoded
from evaler.features.identity import IDENTITY_BYTES, Identities
from evaler.features.provenance import Provenance, Purpose
from evaler.features.store import (
    Features,
    FeaturesError,
    Rejected,
    feature_path,
    load,
    read_manifest,
    read_records,
    write_records,
)
from evaler.sources.images import ImageList

GPU_WORKERS = 4  # where the configuration leaves it open


@dataclass(frozen=True, eq=False)
class Job:
    """One collection to extract."""

    cfg: CfgNode
    network: nn.Module
    images: ImageList
    parent: Path  # the folder of the set
    plan: Plan
    limits: Limits
    identities: Identities
    _rejections: dict[int, int] = field(default_factory=dict)  # of chunks on disk, by number
    _checked: set[int] = field(default_factory=set)  # chunks on disk whose images are as they were
    _verdicts: dict[tuple[int, int], bool] = field(default_factory=dict)  # on complete collections, by their manifest
    _at_work: list[bool] = field(default_factory=list)  # not empty once a chunk is written

    @classmethod
    def make(
        cls, cfg: CfgNode, network: nn.Module, provenance: Provenance, parent: Path, collection: str, images: ImageList
    ) -> "Job":
        """Raises `ImageError` for an image that is missing, unless INFER.SKIP_BROKEN leaves room for it."""
        limits, stat = limits_of(cfg), images.stat()

        def part(index: int) -> str:
            """Of a cropped image: whether the whole has too many pixels is seen before it is cropped."""
            return f"{images.box(index)} {limits.max_pixels}" if images.box(index) else ""

        plan = Plan(
            collection,
            len(images),
            cfg.INFER.CHUNK_SIZE,
            hashlib.sha256(name_lines(images.names)).hexdigest(),
            cfg.INFER.DTYPE,
            replace(
                provenance,
                list_sha256=images.sha256(missing_ok=cfg.INFER.SKIP_BROKEN > 0, stat=stat),
                limits=(limits.min_side, limits.max_aspect, limits.max_pixels),
            ),
        )
        return cls(cfg, network, images, parent, plan, limits, Identities(images, stat, part))

    @property
    def title(self) -> str:
        return f"{self.parent.name} {self.plan.collection}"

    @property
    def workers(self) -> int:
        return workers_of(self.cfg, gpu=self.plan.provenance.device == "GPU")

    @property
    def folder(self) -> Path:
        """Of the chunks."""
        return self.plan.folder(self.parent)

    def is_joined(self) -> bool:
        """Whether the manifest of a complete collection is there, one of these very images in this very way."""
        try:
            manifest = read_manifest(self.parent, self.plan.collection)
            status = feature_path(self.parent, self.plan.collection).stat()
        except (FeaturesError, OSError):
            return False
        differing = manifest["provenance"].differing(self.plan.provenance, Purpose.SAME_COLLECTION)
        if differing or manifest["dtype"] != self.plan.dtype or len(manifest["rejected"]) > self.cfg.INFER.SKIP_BROKEN:
            return False
        key = status.st_ino, status.st_mtime_ns
        if key not in self._verdicts:
            self._verdicts[key] = self._holds(manifest)
        return self._verdicts[key]

    def _holds(self, manifest: dict) -> bool:
        """Whether the images of a collection of this list are what they were when it was made."""
        records = read_records(self.parent, self.plan.collection, manifest)
        if records is None or len(records) != len(self.images):
            path = feature_path(self.parent, self.plan.collection, ".files")
            print(f"note: {path}: missing or damaged, what was described is not known", file=sys.stderr)
            return False
        same = self.identities.same(range(len(records)), records, title=f"checking {self.title}")
        if same.all() and self.cfg.INFER.CUT_NUM == 1:  # files that were copied need not be read again
            renewed = self.identities.restamped(records)
            if ((renewed != records).any(axis=1) & renewed[:, IDENTITY_BYTES:].any(axis=1)).any():
                with contextlib.suppress(OSError):  # a folder that may only be read
                    write_records(self.parent, self.plan.collection, manifest, renewed)
        return bool(same.all())

    def is_there(self) -> bool:
        """Whether the complete collection is, every byte as its manifest says."""
        try:
            load(self.parent, self.plan.collection)
        except FeaturesError:
            return False  # absent or broken: it is extracted anew
        return self.is_joined()

    def _another_joined(self) -> bool:
        """Whether all is complete by now, which it was not at the start: another shard has joined it."""
        return self.is_joined() and self.is_there()  # in this order: a manifest of other images is soon seen

    def chunks_left(self, cut: int, total: int) -> list[int]:
        """Those of a shard that are missing, or of which an image has changed since: these are set aside.

        None of them once another shard has joined all, whose chunks are gone then.
        """
        try:
            left = self._chunks_left(cut, total)
        except (FeaturesError, FileNotFoundError):  # of a chunk that was there a moment ago
            if not self._another_joined():
                raise
            return []
        return [] if left and self._another_joined() else left

    def _chunks_left(self, cut: int, total: int) -> list[int]:
        there = present(self.folder)
        numbers = self.plan.shard(cut, total)
        unsure = [number for number in numbers if number in there and number not in self._checked]
        for number in unsure:
            records = read_records_of_chunk(self.folder, self.plan, number)
            if self.identities.same(self.plan.rows(number), records).all():
                self._checked.add(number)
            else:
                set_aside(self.folder, number)
                there.remove(number)
        return [number for number in numbers if number not in there]

    def images_left(self, cut: int, total: int) -> int:
        return sum(len(self.plan.rows(number)) for number in self.chunks_left(cut, total))

    def extract(self, cut: int, total: int, counter: Counter) -> None:
        """Write the chunks of a shard that are not there. Raises `ImageError` naming an image that cannot be used."""
        self._tell_of_replaced()
        for other in plans(self.parent):
            if other.name.startswith(f"{self.plan.collection}.") and other != self.folder:
                self._tell_of(other)
        numbers = self.chunks_left(cut, total)
        if not numbers:
            return
        with contextlib.ExitStack() as stack:
            earlier = self._earlier(numbers)
            held: dict[int, dict[int, Descriptor]] = {}  # of chunks that are not held as a whole
            taken = 0
            for number in numbers:
                rows = self.plan.rows(number)
                same = earlier.same(rows, self.images.names[rows.start : rows.stop], self.identities, self._may_be_used)
                taken += len(same)
                if len(same) == len(rows):
                    self._write(number, self._content(rows, iter(()), same, counter), stack)
                else:
                    held[number] = same
            if taken:
                print(
                    f"{self.title}: {taken} images of this shard's {sum(map(len, map(self.plan.rows, numbers)))} are "
                    "unchanged, their descriptors are taken over"
                )
                if (self.plan.provenance.batch_size or 1) > 1:
                    print(
                        f"note: {self.title}: they were described in other batches, which moves the last digits; "
                        "for the very bytes of a fresh extraction use another OUT_DIR",
                        file=sys.stderr,
                    )
            if held:
                self._describe_rest(held, counter, stack)

    def _earlier(self, numbers: Sequence[int]) -> Earlier:
        wanted = {self.images.names[index] for number in numbers for index in self.plan.rows(number)}
        return Earlier(self.parent, self.plan, dim=self.cfg.MODEL.HEADS.REDUCTION_DIM, wanted=wanted)

    def _may_be_used(self, index: int, width: int, height: int) -> bool:
        """Whether an image that was described is one that would be described now."""
        try:
            self.limits.check(width, height)
        except ValueError:
            return False
        return self.images.box(index) is not None or width * height <= self.limits.max_pixels

    def _describe_rest(
        self, held: Mapping[int, Mapping[int, Descriptor]], counter: Counter, stack: contextlib.ExitStack
    ) -> None:
        indices = (index for number in held for index in self.plan.rows(number) if index not in held[number])
        pictures = Pictures(self.images, self.limits, on_gpu=nvjpeg() if self.cfg.INFER.GPU_JPEG else None)
        stream = decoded(pictures, indices, workers=self.workers, timeout=self.cfg.DATA_LOADER.TIMEOUT)
        with contextlib.closing(stream):
            for number, same in held.items():
                self._write(number, self._content(self.plan.rows(number), stream, same, counter), stack)

    def _write(self, number: int, content: Features, stack: contextlib.ExitStack) -> None:
        """Write a chunk; with the first one the folder is made and locked until the stack is left."""
        if not self._at_work:  # not before: a run that fails at its first image leaves nothing behind
            stack.enter_context(folder_lock(self.folder, shared=True))
            write_plan(self.parent, self.plan)
            self._at_work.append(True)
        write_chunk(self.folder, self.plan, number, content)
        self._checked.add(number)

    def _tell_of_replaced(self) -> None:
        try:
            old = read_manifest(self.parent, self.plan.collection)
        except FeaturesError:
            return
        keys = old["provenance"].differing(self.plan.provenance, Purpose.SAME_COLLECTION)
        if keys:
            print(
                f"note: {self.title}: {old['count']} descriptors extracted in another way (differs in "
                f"{', '.join(keys)}) are replaced once the new ones are complete",
                file=sys.stderr,
            )

    def _tell_of(self, folder: Path) -> None:
        try:
            other = read_plan(folder)
        except FeaturesError as error:
            print(f"note: {error}", file=sys.stderr)
            return
        keys = list(other.provenance.differing(self.plan.provenance, Purpose.SAME_COLLECTION))
        settings = ("chunk_size", "collection", "dtype", "images", "names_sha256")
        keys += [key for key in settings if getattr(other, key) != getattr(self.plan, key)]
        mend = "delete it if it is not wanted"
        if made_alike(other.provenance, self.plan):
            mend = (
                "descriptors of images that are the same are taken over; it is removed once all are, else delete it "
                "if it is not wanted"
            )
        print(
            f"note: {folder} holds {len(present(folder))} of {other.chunks} chunks of another extraction (differs in "
            f"{', '.join(keys)}); {mend}",
            file=sys.stderr,
        )

    def _content(
        self, rows: range, stream: Iterator[Picture | Broken], same: Mapping[int, Descriptor], counter: Counter
    ) -> Features:
        """A chunk: what is in `same`, and the rest as it comes out of the stream."""
        vectors = {index: descriptor.vector() for index, descriptor in same.items()}
        sizes = {index: descriptor.size for index, descriptor in same.items()}
        records = {index: self.identities.stamped(index, descriptor.identity) for index, descriptor in same.items()}
        machines = {name for descriptor in same.values() for name in descriptor.machines}
        rejected: list[Rejected] = []
        counter.add(len(same))

        def usable() -> Iterator[Picture]:
            for _ in range(len(rows) - len(same)):
                item = next(stream)
                records[item.index] = self.identities.record(item.index, item.sha256)
                if isinstance(item, Broken):
                    rejected.append(Rejected(item.index, self.images.names[item.index], item.reason))
                    self._check_rejected(rejected)
                    counter.add(1)
                else:
                    yield item

        for group in by_size(usable(), self.limits, batch_size=self.plan.provenance.batch_size or 1):
            pixels = torch.stack([torch.as_tensor(picture.pixels) for picture in group])
            described = describe_batch(
                self.network, pixels, scales=self.limits.scales, max_pixels=self.limits.max_level_pixels
            )
            for picture, vector in zip(group, described, strict=True):
                vectors[picture.index], sizes[picture.index] = vector, picture.size
            counter.add(len(group))
            machines.add(machine())
        order, dim = sorted(vectors), self.cfg.MODEL.HEADS.REDUCTION_DIM
        return Features(
            [self.images.names[index] for index in order],
            np.array([vectors[index] for index in order], np.float32).reshape(len(order), dim),
            np.array([sizes[index] for index in order], np.int32).reshape(-1, 2),
            self.plan.provenance,
            rejected,
            sorted(machines),
            np.stack([records[index] for index in rows]),
        )

    def _check_rejected(self, rejected: list[Rejected]) -> None:
        """Raise `ImageError` if the last one is one too many, over all shards."""
        most, last = self.cfg.INFER.SKIP_BROKEN, rejected[-1]
        if len(rejected) + (self._rejected() if most else 0) > most:
            more = f" (and {most} images are rejected already, all that INFER.SKIP_BROKEN allows)" if most else ""
            raise ImageError(f"{self.images.source(last.index)}: {last.reason}{more}")

    def _rejected(self) -> int:
        """Images that the chunks on disk reject."""
        for number in present(self.folder) - self._rejections.keys():
            self._rejections[number] = len(read_header(self.folder, self.plan, number)["rejected"])
        return sum(self._rejections.values())

    def finish(self) -> str:
        """Join the chunks if all of them are there, whichever shard made them; say how things stand."""
        absent = len(missing(self.folder, self.plan))
        if absent and not self._another_joined():
            return f"{self.title}: this shard is done; {absent} of {self.plan.chunks} chunks are still to come"
        if not absent:
            try:
                self._join()
            except InUse:
                return f"{self.title}: this shard is done; the last one to end joins all"
            except (ValueError, OSError):  # chunks that were there a moment ago
                if not self._another_joined():
                    raise
        path = feature_path(self.parent, self.plan.collection)
        rejected = len(read_manifest(self.parent, self.plan.collection)["rejected"])
        others = f", {rejected} images are rejected and listed in {path}" if rejected else ""
        return f"{self.title}: {len(self.images) - rejected} descriptors are in {self.parent}{others}"

    def _join(self) -> None:
        if self._rejected() > self.cfg.INFER.SKIP_BROKEN:
            raise FeaturesError(
                f"{self.folder}: {self._rejected()} images are rejected, INFER.SKIP_BROKEN allows "
                f"{self.cfg.INFER.SKIP_BROKEN}; raise it, or mend the images and extract again"
            )
        join(self.parent, self.plan)
        for folder in superseded(self.parent, self.plan, self.images.names):
            with contextlib.suppress(InUse), folder_lock(folder):
                discard(folder)


def workers_of(cfg: CfgNode, *, gpu: bool) -> int:
    """Processes that decode, INFER.NUM_WORKERS."""
    return cfg.INFER.NUM_WORKERS if cfg.INFER.NUM_WORKERS >= 0 else GPU_WORKERS * gpu


def limits_of(cfg: CfgNode) -> Limits:
    return Limits(
        tuple(cfg.INFER.SCALES),
        cfg.INFER.MIN_SIDE,
        cfg.INFER.MAX_ASPECT,
        cfg.INFER.MAX_PIXELS,
        cfg.INFER.MAX_LEVEL_PIXELS,
    )


def machine() -> str:
    """What the descriptors are made on."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
