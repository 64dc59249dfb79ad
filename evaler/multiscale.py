"""One descriptor for an image from several scales of it."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import preprocess


@torch.no_grad()
def describe(network: nn.Module, image: np.ndarray, *, scales: Sequence[float]) -> Tensor:
    """uint8 [H, W, 3] BGR -> descriptor [D] of length 1, on the network's device.

    The image is described at every scale; the descriptors are normalised, averaged, normalised. Raises `ValueError` if
    a side vanishes at a scale.
    """
    like = next(network.parameters())
    sum_ = torch.zeros((), dtype=like.dtype, device=like.device)
    for scale in scales:
        batch = torch.from_numpy(preprocess(image, scale))[None].to(like, memory_format=torch.channels_last)
        sum_ = sum_ + F.normalize(network(batch))[0]
    return F.normalize(sum_ / len(scales), dim=0)
