"""DOLG arranged for speed: the same function of the image, fewer operations, no gradients.

What is fast about a layer stands beside the layer, as its `arranged`. Here the parts are put together, and the whole is
held against the network that it was made of: a layer may be changed without its fast form.
"""

import copy
import warnings

import torch
from torch import Tensor, nn

from model.dolg import DOLG
from model.errors import ModelError
from model.folding import How, can_fuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far the arranged network may be from the plain one, as `_distance` tells it.
BOUNDS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
# Of the image it is measured with: f3 is 3 x 19, as wide as the multi-atrous module's taps reach, and no larger.
CHECKED_SIZE = (33, 291)


def for_inference(network: DOLG, *, precision: str = "fp32", compiled: bool = False) -> nn.Module:
    """A module for descriptors alone: float32 normalised BGR [B, 3, H, W] -> float32 [B, dim], not normalised.

    It lies on the network's device, and shares nothing with the network, which must be in eval mode and without a head.
    Precision is that of the convolutions; pooling, the sums over the attention and the linear layers are float32 in all
    of them. On a CPU bf16 is fast where the processor computes in it (AVX-512 BF16, AMX), fp16 hardly anywhere.

    At fp32 the descriptors keep within 1e-6 (1 - cosine) of the network's; see docs/performance.md for the others. On a
    GPU, whether cuDNN may round float32 to TF32 is the caller's to say: `torch.backends.cudnn.allow_tf32`. Where the
    arranged network is further from the plain one than `BOUNDS`, a warning says so, and a copy of that is returned.
    """
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r} is none of {', '.join(DTYPES)}")
    assert not network.training, "BN is folded with its running statistics: eval mode"
    device = next(network.parameters()).device
    rounds = device.type == "cuda" and torch.backends.cudnn.allow_tf32  # to the mantissa of float16
    # Float32 first, whatever is asked for: it tells an edited layer from rounding.
    for name in dict.fromkeys(("fp32", precision)):
        dtype = DTYPES[name]
        # The compiler finds fusions of its own in plain operations.
        how = How(dtype, fused=not compiled and can_fuse(device, dtype))
        with torch.no_grad():
            arranged = Inference(_arranged(network, how).to(device), dtype)
            distance = _distance(network, arranged, halves=name == "fp32" and not rounds)
        bound = BOUNDS["fp16" if name == "fp32" and rounds else name]
        if not distance <= bound:
            warnings.warn(
                f"at {name} the network arranged for speed is {distance:.1e} from the plain one, more than {bound:g}: "
                "the plain one is used, which is slower",
                stacklevel=2,
            )
            arranged = Inference(copy.deepcopy(network).float(), torch.float32)
            break
    arranged.requires_grad_(False).eval()
    if compiled:
        arranged.network.compile(dynamic=True)
    return arranged


class Inference(nn.Module):
    """Runs `network` without gradients, on images as its convolutions want them."""

    def __init__(self, network: DOLG, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.prepared(images))

    def prepared(self, images: Tensor) -> Tensor:
        return images.to(self.dtype, memory_format=torch.channels_last)


def _arranged(network: DOLG, how: How) -> DOLG:
    """A copy whose backbone and local branch are their arranged forms. A backbone without one is used as it is."""
    parts = {"globalmodel": network.globalmodel}
    if network.localmodel is not None:
        parts["localmodel"] = network.localmodel
    arranged = copy.deepcopy(network, {id(part): nn.Identity() for part in parts.values()}).float()
    for name, part in parts.items():
        with_form = hasattr(part, "arranged")
        setattr(arranged, name, part.arranged(how) if with_form else copy.deepcopy(part).to(how.dtype))
    return arranged


@torch.inference_mode()
def _distance(network: DOLG, arranged: Inference, *, halves: bool) -> float:
    """How far apart their descriptors of one image of noise are: half the squared distance over the squared length,
    which is 1 - cosine where the lengths agree. With `halves` the largest of that and of the global and the local half
    before `fc`, one of which may weigh little; the local one may nearly vanish, and below float32 is then mostly
    rounding. 0 where the network itself gives nothing finite to compare with.
    """
    noise = torch.randn(1, 3, *CHECKED_SIZE, generator=torch.Generator().manual_seed(0))
    parameter = next(network.parameters())
    expected, given = network.fused(noise.to(parameter)), arranged.network.fused(arranged.prepared(noise.to(parameter)))
    pairs = [(network.fc(expected), arranged.network.fc(given))]
    if halves:
        count = 1 if network.localmodel is None else 2
        pairs += zip(expected.chunk(count, dim=1), given.chunk(count, dim=1), strict=True)
    if not all(whole.isfinite().all() for whole, _ in pairs):
        return 0.0
    squares = [(a - b).square().sum() / (2 * a.square().sum()).clamp_min(torch.finfo(a.dtype).tiny) for a, b in pairs]
    return torch.stack(squares).max().item()  # not a number where one is not
