"""mAP of Revisited sets in the course of a training run; `train.py` hands it to the trainer as a callable."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from core.logging import log
from core.processes.distributed import gather_objects, rank, world_size
from core.processes.progress import progress
from datasets.images.decode import ImageError
from evaler.extraction.job import limits_of, workers_of
from evaler.extraction.multiscale import check_lengths, describe_batch
from evaler.extraction.pictures import Broken, Picture, Pictures, by_size, decoded
from evaler.network import batch_size_of
from evaler.sources.image_list import ImageList
from evaler.sources.images import revisited_set
from model.classifier import Classifier
from revisitop import groundtruth, protocol

LEVELS = {setting: name.lower() for setting, name in protocol.SETTING_NAMES.items()}


def check_sets(cfg: CfgNode) -> None:
    """Raise `UserError` now if a set of TEST.RETRIEVAL lacks its ground truth or an image, rather than hours later."""
    for name in cfg.TEST.RETRIEVAL:
        for images in revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY).values():
            images.sha256()


def score_sets(cfg: CfgNode, network: Classifier, poll: Callable[[], None]) -> dict[str, dict[str, float | None]]:
    """mAP in percent of each set of TEST.RETRIEVAL: set -> {easy, medium, hard}, None where no query has positives.

    By the descriptors that extraction with the same keys of INFER gives; None for all where one of them is zero or not
    finite, as those of the first epochs may be. A collective call: every process describes its share, and calls `poll`
    equally often: before each image, and twice before descriptors are exchanged.
    """
    descriptor = _Descriptor(network)
    scores = {}
    for name in cfg.TEST.RETRIEVAL:
        collections = revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY)
        with _untimed():
            vectors = {
                collection: _describe_all(descriptor, images, cfg, f"{name} {collection}", poll)
                for collection, images in collections.items()
            }
        try:
            for collection, images in collections.items():
                check_lengths(vectors[collection], [images.source(index) for index in range(len(images))])
        except ValueError as error:
            log(f"{name} is not scored: {error}")
            scores[name] = dict.fromkeys(LEVELS.values())
            continue
        truth = groundtruth.load(groundtruth.path_of(cfg.INFER.DATA_DIR, name))
        scored = protocol.evaluate(vectors["queries"], vectors["database"], truth, (1,))
        fractions = {LEVELS[setting]: float(values["mAP"]) for setting, values in scored.items()}
        scores[name] = {key: None if np.isnan(value) else 100 * value for key, value in fractions.items()}
    return scores


class _Descriptor(nn.Module):
    """The descriptor of a classifier."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.descriptors(images)


@contextlib.contextmanager
def _untimed() -> Iterator[None]:
    """Without cuDNN's timing of its algorithms: it is done anew for every size, and here nearly all sizes differ."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _describe_all(
    network: nn.Module, images: ImageList, cfg: CfgNode, title: str, poll: Callable[[], None]
) -> np.ndarray:
    """float32 [N, D], in the order of `images`, in every process; each describes every `world_size()`th image.

    Raises `ImageError` for one that cannot be read. Small and narrow ones, which extraction rejects, are described.
    """
    gpu = next(network.parameters()).is_cuda
    limits = replace(limits_of(cfg), min_side=1, max_aspect=math.inf)
    own = range(rank(), len(images), world_size())
    vectors: dict[int, np.ndarray] = {}
    stream = decoded(Pictures(images, limits), own, workers=workers_of(cfg, gpu=gpu), timeout=cfg.DATA_LOADER.TIMEOUT)

    def usable() -> Iterator[Picture]:
        rounds = -(-len(images) // world_size())
        for number in progress(range(rounds), title, unit="image", leave=False):
            poll()
            if number * world_size() + rank() < len(images):
                item = next(stream)
                if isinstance(item, Broken):
                    raise ImageError(f"{images.source(item.index)}: {item.reason}")
                yield item

    with contextlib.closing(stream):
        for group in by_size(usable(), limits, batch_size=batch_size_of(cfg, gpu=gpu)):
            pixels = torch.stack([torch.as_tensor(picture.pixels) for picture in group])
            described = describe_batch(network, pixels, scales=limits.scales, max_pixels=limits.max_level_pixels)
            vectors |= zip((picture.index for picture in group), described, strict=True)
    poll()
    poll()
    everywhere = {index: vector for share in gather_objects(vectors) for index, vector in share.items()}
    return np.stack([everywhere[index] for index in range(len(images))])
