"""Convolutions as they are applied when nothing is trained any more: BN within the weights, ReLU and sum fused."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None) -> tuple[Tensor, Tensor]:
    """Weight [O, I, h, w] and bias [O], float64, of one convolution for `conv` and `bn` in eval mode."""
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    if bn is None:
        return weight, bias
    assert bn.running_mean is not None and bn.running_var is not None, "statistics of the batch cannot be folded"
    factor = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    return weight * factor[:, None, None, None], (bias - bn.running_mean.double()) * factor + bn.bias.detach().double()


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolutions with ReLU and sum built in, those that torch.compile uses, serve here."""
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_convolution_pointwise_")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class How(NamedTuple):
    """How a network's convolutions are computed when it is arranged for inference."""

    dtype: torch.dtype
    fused: bool  # by oneDNN's convolutions with ReLU and sum, see `can_fuse`


class FusedConv(nn.Module):
    """relu(conv(x) + add), where ReLU and `add` are optional. Weight and bias are rounded to `dtype` once.

    Weights are not packed for oneDNN beforehand: which order it wants depends on the size of the image, and a wrong
    one costs the small levels of the pyramid half as much again (the right one would save 3%).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        how: How,
        relu: bool = False,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ):
        super().__init__()
        self.register_buffer("weight", weight.to(how.dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.to(how.dtype))
        self.geometry = list(stride), list(padding), list(dilation), groups
        self.relu, self.fused = relu, how.fused

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None, *, how: How, relu: bool = False) -> "FusedConv":
        geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        return cls(*fold(conv, bn), how=how, relu=relu, **geometry)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W']. `add`, of the result's shape, is overwritten."""
        stride, padding, dilation, groups = self.geometry
        if self.fused:
            geometry = padding, stride, dilation, groups
            ops, weight, bias = torch.ops.mkldnn, self.weight, self.bias
            if add is None:
                return ops._convolution_pointwise(x, weight, bias, *geometry, "relu" if self.relu else "none", [], "")
            relu = "relu" if self.relu else None
            return ops._convolution_pointwise_.binary(add, x, weight, bias, *geometry, "add", 1.0, relu, [], None)
        out = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if add is not None:
            out = out.add_(add)
        return out.relu_() if self.relu else out
