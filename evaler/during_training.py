"""mAP of Revisited sets in the course of a training run; `train.py` hands it to the trainer as a callable."""

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from yacs.config import CfgNode

from core.distributed import gather_objects, rank, world_size
from core.progress import progress
from evaler.images import ImageList, read_cropped, revisited_set
from evaler.multiscale import describe_batch
from model.classifier import Classifier
from revisitop import groundtruth, protocol

NAMES = {"E": "easy", "M": "medium", "H": "hard"}


def check_sets(cfg: CfgNode) -> None:
    """Raise `ValueError` now if a set of TEST.RETRIEVAL lacks its ground truth or an image, rather than hours later."""
    for name in cfg.TEST.RETRIEVAL:
        for images in revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY).values():
            images.sha256()


def score_sets(cfg: CfgNode, network: nn.Module, poll: Callable[[], None]) -> dict[str, dict[str, float | None]]:
    """mAP in percent of each set of TEST.RETRIEVAL: set -> {easy, medium, hard}, None where no query has positives.

    By the descriptors that extraction with the same keys of INFER gives. A collective call: every process describes
    its share, and calls `poll` before each image equally often.
    """
    descriptor = _Descriptor(network)
    scores = {}
    for name in cfg.TEST.RETRIEVAL:
        collections = revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY)
        vectors = {
            collection: _describe_all(descriptor, images, cfg.INFER, f"{name} {collection}", poll)
            for collection, images in collections.items()
        }
        truth = groundtruth.load(f"{cfg.INFER.DATA_DIR}/{name}/gnd_{name}.pkl")
        found = protocol.evaluate(vectors["queries"], vectors["database"], truth, (1,))
        fractions = {NAMES[setting]: float(values["mAP"]) for setting, values in found.items()}
        scores[name] = {key: None if np.isnan(value) else 100 * value for key, value in fractions.items()}
    return scores


class _Descriptor(nn.Module):
    """The descriptor of a classifier."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.descriptors(images)


def _describe_all(
    network: nn.Module, images: ImageList, settings: CfgNode, title: str, poll: Callable[[], None]
) -> np.ndarray:
    """float32 [N, D], in the order of `images`, in every process."""
    world, own = world_size(), []
    rounds = -(-len(images) // world)
    for number in progress(range(rounds), title, unit="image", leave=False):
        poll()
        index = number * world + rank()
        if index < len(images):
            image = read_cropped(images, index, max_pixels=settings.MAX_PIXELS)
            vectors = describe_batch(network, image[None], scales=settings.SCALES, max_pixels=settings.MAX_LEVEL_PIXELS)
            own.append(vectors[0])
    shares = gather_objects(own)
    return np.stack([shares[index % world][index // world] for index in range(len(images))])
