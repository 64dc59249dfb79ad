"""One descriptor for an image from several scales of it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.base.errors import UserError
from datasets.transforms import MEAN_BGR, SD_BGR, normalise_into, preprocess, resize_bilinear, scaled_size
from evaler.extraction.fitting import MAX_LEVEL_PIXELS, fits, reduce_to_fit


@torch.no_grad()
def describe(network: nn.Module, image: np.ndarray, *, scales: Sequence[float]) -> Tensor:
    """uint8 [H, W, 3] BGR -> descriptor [D] of length 1, on the network's device.

    The image is described at every scale; the descriptors are normalised, averaged, normalised. Raises `UserError` if
    a side vanishes at a scale. This is the plain way, in the network's precision; `describe_batch` is the fast one.
    """
    like = next(network.parameters())
    sum_ = torch.zeros((), dtype=like.dtype, device=like.device)
    for scale in scales:
        batch = torch.from_numpy(preprocess(image, scale))[None].to(like, memory_format=torch.channels_last)
        sum_ = sum_ + F.normalize(network(batch))[0]
    return F.normalize(sum_ / len(scales), dim=0)


@torch.no_grad()
def describe_batch(
    network: nn.Module,
    images: np.ndarray | Tensor,
    *,
    scales: Sequence[float],
    max_pixels: int = MAX_LEVEL_PIXELS,
) -> np.ndarray:
    """uint8 [B, H, W, 3] BGR -> descriptors float32 [B, D] of length 1; in CPU memory, or on the network's GPU.

    Images of one size, so that none is padded; larger ones than `max_pixels` allows are made smaller, see
    `reduce_to_fit`. On the CPU each level is, bit for bit, that of `describe`; on a GPU the images are copied once and
    all levels are made there, which moves a descriptor by 6e-8 (1 - cosine). Raises `UserError` as `describe` does.
    """
    images = torch.as_tensor(images)
    assert images.dtype == torch.uint8 and images.dim() == 4 and len(images), (images.dtype, images.shape)
    height, width = images.shape[1:3]
    if not fits(width, height, scales=scales, max_pixels=max_pixels):
        reduced = [reduce_to_fit(image, scales=scales, max_pixels=max_pixels) for image in images.cpu().numpy()]
        images = torch.from_numpy(np.stack(reduced))
    device = next(network.parameters()).device
    if _is_cpu(device):
        levels = pyramid(images.numpy(), scales)
    else:
        levels = pyramid_on_device(_copied(images, device), scales)
    sum_ = sum((F.normalize(network(level)) for level in levels), torch.zeros(()))
    return F.normalize(sum_ / len(scales)).cpu().numpy()


def check_lengths(vectors: np.ndarray, names: Sequence[str]) -> None:
    """Raise `UserError` for descriptors [N, D] that are not of length 1: of weights or images that give nothing."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for name, length in zip(names, lengths, strict=True):
        if not abs(length - 1) < 1e-3:  # NaN too
            raise UserError(f"{name}: its descriptor has length {length:.4g}, not 1; a precision of fp32 may mend it")


def pyramid(images: np.ndarray, scales: Sequence[float]) -> Iterator[Tensor]:
    """uint8 [B, H, W, 3] -> at each scale float32 [B, 3, h, w] in channels_last, with the values of `preprocess`."""
    height, width = images.shape[1:3]
    sizes = [scaled_size(width, height, scale) for scale in scales]
    originals = [image.astype(np.float32) for image in images]
    for w, h in sizes:
        level = torch.empty(len(images), h, w, 3)
        for original, out in zip(originals, level.numpy(), strict=True):
            normalise_into(out, resize_bilinear(original, w, h))
        yield level.permute(0, 3, 1, 2)


def pyramid_on_device(images: Tensor, scales: Sequence[float]) -> Iterator[Tensor]:
    """The same from a uint8 tensor on any device, made there: within a rounding of cv2's values.

    Interpolation is bilinear at the rounded size, without antialiasing: with it, or with padding, the descriptors are
    others.
    """
    height, width = images.shape[1:3]
    sizes = [scaled_size(width, height, scale) for scale in scales]
    pixels = images.permute(0, 3, 1, 2).float()
    mean, sd = (torch.from_numpy(part).to(pixels.device)[:, None, None] for part in (MEAN_BGR, SD_BGR))
    for w, h in sizes:
        level = pixels
        if (w, h) != (width, height):
            level = F.interpolate(pixels, size=(h, w), mode="bilinear", align_corners=False, antialias=False)
        yield (level / 255).sub_(mean).div_(sd)


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _copied(images: Tensor, device: torch.device) -> Tensor:
    """On the device. From page-locked memory, from where the processor need not copy it by hand."""
    if images.device.type == device.type:
        return images
    return images.pin_memory().to(device, non_blocking=True)
