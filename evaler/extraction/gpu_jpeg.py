"""JPEGs decoded on the GPU: nvJPEG, as torchvision wraps it (INFER.GPU_JPEG).

https://docs.pytorch.org/vision/stable/generated/torchvision.io.decode_jpeg.html

Its pixels are not those of libjpeg-turbo, whose inverse DCT and interpolation of colour are others, so neither are the
descriptors: extractions with and without it are not mixed, and `python scripts/benchmark.py drift` states by how much
they differ on a GPU at hand. Damage inside the compressed data is not looked for.
"""

from collections.abc import Callable

from torch import Tensor

from core.base.errors import UserError
from core.base.terminal import reason_of
from datasets.images.decode import TURNS

GpuDecoder = Callable[[Tensor], Tensor]  # uint8 [bytes] in CPU memory -> uint8 [3, H, W] RGB
_MIRRORED = {None: (), 1: (1,), 0: (0,), -1: (0, 1)}  # the dimensions that cv2.flip's numbers stand for


def nvjpeg() -> GpuDecoder:
    """A decoder onto the current GPU. Raises `UserError` where torchvision is missing or does not fit PyTorch."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError) as error:  # the latter by operators that are not there
        mend = "install it, or leave the key False"
        raise UserError(f"INFER.GPU_JPEG needs torchvision ({reason_of(error)}); {mend}") from None
    return lambda data: decode_jpeg(data, mode=ImageReadMode.RGB, device="cuda")


def upright_bgr(image: Tensor, orientation: int) -> Tensor:
    """uint8 [3, H, W] RGB as stored -> [H, W, 3] BGR, turned as EXIF's `orientation` says."""
    image = image.flip(0).permute(1, 2, 0)
    transpose, mirror = TURNS.get(orientation, (False, None))
    image = image.transpose(0, 1) if transpose else image
    return image.flip(_MIRRORED[mirror])
