"""Where the local branch looks: its attention map of a photograph."""

from pathlib import Path

import numpy as np
import torch

from core.base.errors import UserError
from core.base.files import sha256_file
from datasets.images.decode import MAX_PIXELS
from datasets.transforms import preprocess
from evaler.extraction.fitting import MAX_LEVEL_PIXELS, reduce_to_fit
from evaler.features.provenance import Provenance
from evaler.network import load_file
from evaler.sources.image_list import ImageList, read_cropped
from model.dolg import DOLG


class AttentionError(UserError):
    """Why there are no attention maps; the message is one line."""


def load_network(provenance: Provenance, *, weights: str = "", device: str = "cpu") -> DOLG:
    """The network that made descriptors, in eval mode, from the file that their provenance tells or `weights` names.

    Raises `AttentionError` if neither is the file that was used, or the network has no local branch.
    """
    told = provenance.weights
    places = [Path(place) for place in (told, weights) if place and Path(place).is_file()]
    if not places:
        raise AttentionError(f"{weights or told}: no such weights; name them in TEST.WEIGHTS")
    paths = [path for path in places if sha256_file(path) == provenance.weights_sha256]
    if not paths:
        raise AttentionError(f"{places[-1]}: not the weights the set was described with (sha256)")
    recorded = {"RESNET.STRIDE_1X1": provenance.stride_1x1, "BN.EPS": provenance.bn_eps}
    settings = [str(part) for pair in recorded.items() if pair[1] is not None for part in pair]
    network = load_file(paths[0], device, settings).plain
    if network.localmodel is None:
        raise AttentionError(f"{paths[0]}: a global-only network has no local branch")
    return network


def attention_of(network: DOLG, images: ImageList, index: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """float32 [h, w], a position for 16 x 16 pixels, at scale 1. Raises `ImageError`."""
    image = read_cropped(images, index, max_pixels=max_pixels)
    return attention_map(network, reduce_to_fit(image, scales=[1.0], max_pixels=MAX_LEVEL_PIXELS))


@torch.inference_mode()
def attention_map(network: DOLG, image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> the attention of the local branch (DOLG section 3.2), float32 [H / 16, W / 16], upwards
    rounded: by how much each local descriptor counts."""
    assert network.localmodel is not None  # `load_network` gives no other
    like = next(network.parameters())
    f3, _ = network.globalmodel(torch.from_numpy(preprocess(image, 1.0))[None].to(like))
    _, attention = network.localmodel(f3)
    return attention[0, 0].float().cpu().numpy()
