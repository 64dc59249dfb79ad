"""One collection to extract: what of it is there, what is left, and how its chunks are made."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from core.counter import Counter
from core.lock import InUse, folder_lock
from datasets.image import ImageError
from evaler.chunks import Plan, name_lines, plans, present, read_header, read_plan, write_chunk, write_plan
from evaler.features import Features, FeaturesError, Rejected, feature_path, load, read_manifest
from evaler.gpu_jpeg import nvjpeg
from evaler.images import ImageList
from evaler.join import join, missing
from evaler.multiscale import describe_batch
from evaler.pictures import Broken, Limits, Picture, Pictures, by_size, decoded
from evaler.provenance import PLACES, differing_keys

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
    _rejections: dict[int, int] = field(default_factory=dict)  # of chunks on disk, by number

    @classmethod
    def make(
        cls, cfg: CfgNode, network: nn.Module, provenance: dict, parent: Path, collection: str, images: ImageList
    ) -> "Job":
        """Raises `ImageError` for an image that is missing, unless INFER.SKIP_BROKEN leaves room for it."""
        plan = Plan(
            collection,
            len(images),
            cfg.INFER.CHUNK_SIZE,
            hashlib.sha256(name_lines(images.names)).hexdigest(),
            cfg.INFER.DTYPE,
            {**provenance, "list_sha256": images.sha256(missing_ok=cfg.INFER.SKIP_BROKEN > 0)},
        )
        return cls(cfg, network, images, parent, plan, limits_of(cfg))

    @property
    def title(self) -> str:
        return f"{self.parent.name} {self.plan.collection}"

    @property
    def workers(self) -> int:
        if self.cfg.INFER.NUM_WORKERS >= 0:
            return self.cfg.INFER.NUM_WORKERS
        return GPU_WORKERS if self.plan.provenance["device"] == "GPU" else 0

    @property
    def folder(self) -> Path:
        """Of the chunks."""
        return self.plan.folder(self.parent)

    def is_joined(self) -> bool:
        """Whether the manifest of a complete collection is there, one that was extracted in this very way."""
        try:
            found = read_manifest(self.parent, self.plan.collection)
        except FeaturesError:
            return False
        same = not differing_keys(found["provenance"], self.plan.provenance, but=PLACES)
        return same and found["dtype"] == self.plan.dtype and len(found["rejected"]) <= self.cfg.INFER.SKIP_BROKEN

    def is_there(self) -> bool:
        """Whether the complete collection is, every byte as its manifest says."""
        try:
            load(self.parent, self.plan.collection)
        except FeaturesError:
            return False  # absent or broken: it is extracted anew
        return self.is_joined()

    def chunks_left(self, cut: int, total: int) -> list[int]:
        there = present(self.folder)
        return [number for number in self.plan.shard(cut, total) if number not in there]

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
        indices = (index for number in numbers for index in self.plan.rows(number))
        pictures = Pictures(self.images, self.limits, on_gpu=nvjpeg() if self.cfg.INFER.GPU_JPEG else None)
        stream = decoded(pictures, indices, workers=self.workers)
        with contextlib.ExitStack() as stack:
            stack.callback(stream.close)
            for number in numbers:
                content = self._describe(stream, self.plan.rows(number), counter)
                if number == numbers[0]:  # not before: a run that fails at its first image leaves nothing behind
                    stack.enter_context(folder_lock(self.folder, shared=True))
                    write_plan(self.parent, self.plan)
                write_chunk(self.folder, self.plan, number, content)

    def _tell_of_replaced(self) -> None:
        try:
            old = read_manifest(self.parent, self.plan.collection)
        except FeaturesError:
            return
        keys = differing_keys(old["provenance"], self.plan.provenance, but=PLACES)
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
        keys = differing_keys(other.provenance, self.plan.provenance, but=PLACES)
        keys += differing_keys(vars(other), vars(self.plan), but=("provenance",))
        print(
            f"note: {folder} holds {len(present(folder))} of {other.chunks} chunks of another extraction (differs in "
            f"{', '.join(keys)}); delete it if it is not wanted",
            file=sys.stderr,
        )

    def _describe(self, stream: Iterator[Picture | Broken], rows: range, counter: Counter) -> Features:
        vectors: dict[int, np.ndarray] = {}
        sizes: dict[int, tuple[int, int]] = {}
        rejected: list[Rejected] = []

        def usable() -> Iterator[Picture]:
            for _ in rows:
                item = next(stream)
                if isinstance(item, Broken):
                    rejected.append(Rejected(item.index, self.images.names[item.index], item.reason))
                    self._check_rejected(rejected)
                    counter.add(1)
                else:
                    yield item

        for group in by_size(usable(), self.limits, batch_size=self.plan.provenance["batch_size"]):
            pixels = torch.stack([picture.pixels for picture in group])
            found = describe_batch(
                self.network, pixels, scales=self.limits.scales, max_pixels=self.limits.max_level_pixels
            )
            for picture, vector in zip(group, found, strict=True):
                vectors[picture.index], sizes[picture.index] = vector, picture.size
            counter.add(len(group))
        order, dim = sorted(vectors), self.cfg.MODEL.HEADS.REDUCTION_DIM
        return Features(
            [self.images.names[index] for index in order],
            np.array([vectors[index] for index in order], np.float32).reshape(len(order), dim),
            np.array([sizes[index] for index in order], np.int32).reshape(-1, 2),
            self.plan.provenance,
            rejected,
            [machine()],
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
        if absent and not self.is_joined():  # if it is, another shard has done so
            return f"{self.title}: this shard is done; {absent} of {self.plan.chunks} chunks are still to come"
        if not absent:
            if self._rejected() > self.cfg.INFER.SKIP_BROKEN:
                raise FeaturesError(
                    f"{self.folder}: {self._rejected()} images are rejected, INFER.SKIP_BROKEN allows "
                    f"{self.cfg.INFER.SKIP_BROKEN}; raise it, or mend the images and extract again"
                )
            try:
                join(self.parent, self.plan)
            except InUse:
                return f"{self.title}: this shard is done; the last one to end joins all"
        path = feature_path(self.parent, self.plan.collection)
        rejected = len(read_manifest(self.parent, self.plan.collection)["rejected"])
        others = f", {rejected} images are rejected and listed in {path}" if rejected else ""
        return f"{self.title}: {len(self.images) - rejected} descriptors are in {self.parent}{others}"


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
