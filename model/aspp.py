"""The multi-atrous module of the local branch."""

import copy

import torch
from torch import Tensor, nn

from model.folding import FusedConv, How, fold
from model.resnet import init_convolutions

DILATIONS = (6, 12, 18)


class MultiAtrous(nn.Module):
    """Atrous convolutions at three rates beside a 1x1 convolution and the image average, joined by a 1x1 convolution.

    DOLG section 3.2, after ASPP (Chen et al., DeepLabv3, arXiv:1706.05587). As released, the parallel convolutions
    have a bias and neither BN nor ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, *, branch_channels: int = 512):
        super().__init__()
        self.aspp = nn.ModuleList([nn.Conv2d(in_channels, branch_channels, 1)])
        self.aspp.extend(
            nn.Conv2d(in_channels, branch_channels, 3, padding=dilation, dilation=dilation) for dilation in DILATIONS
        )
        self.im_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, branch_channels, 1), nn.ReLU())
        self.conv_after = nn.Sequential(nn.Conv2d((2 + len(DILATIONS)) * branch_channels, out_channels, 1), nn.ReLU())
        init_convolutions(self)

    def forward(self, f3: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        image = self.im_pool(f3).expand(-1, -1, *f3.shape[2:])
        return self.conv_after(torch.cat([image, *(conv(f3) for conv in self.aspp)], dim=1))

    def arranged(self, how: How) -> "ArrangedMultiAtrous":
        return ArrangedMultiAtrous(self, how)


class ArrangedMultiAtrous(nn.Module):
    """`MultiAtrous` for inference: the last convolution is applied to each branch, with none put side by side.

    There is no ReLU between: image average and 1x1 branch, both 1x1 convolutions of f3, are multiplied with their part
    of it beforehand, or become a bias. On a CPU so are the middle taps of the 3x3 convolutions: what is left are 2x3
    and 1x2 taps, and 15% less work. (Rows of taps outside the image are skipped by oneDNN, columns are not.)
    """

    def __init__(self, aspp: MultiAtrous, how: How):
        super().__init__()
        weight, bias = fold(aspp.conv_after[0])
        image, *parts = weight.split([part.out_channels for part in (aspp.im_pool[1], *aspp.aspp)], dim=1)
        self.im_pool = copy.deepcopy(aspp.im_pool).float()
        self.im_pool_after = nn.Linear(image.shape[1], image.shape[0])
        self.im_pool_after.weight.copy_(image.flatten(1))
        middle = 0
        self.branches = nn.ModuleList()
        for conv, part in zip(aspp.aspp, parts, strict=True):
            taps, tap_bias = fold(conv)
            bias = bias + part.flatten(1) @ tap_bias
            if taps.shape[2:] == (1, 1):
                middle = middle + _product(part, taps)
                continue
            dilation = conv.dilation[0]
            if how.fused:
                middle = middle + _product(part, taps[:, :, 1:2, 1:2])
                sides = [
                    FusedConv(taps[:, :, ::2], padding=(dilation,) * 2, dilation=(2 * dilation, dilation), how=how),
                    FusedConv(taps[:, :, 1:2, ::2], padding=(0, dilation), dilation=(1, 2 * dilation), how=how),
                ]
            else:
                sides = [FusedConv(taps, padding=(dilation,) * 2, dilation=(dilation,) * 2, how=how)]
            last = len(self.branches) == len(parts) - 2
            self.branches.append(nn.ModuleList([*sides, FusedConv(part, relu=last, how=how)]))
        self.middle = FusedConv(middle, how=how)
        self.im_pool_after.bias.copy_(bias)

    def forward(self, f3: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        image = self.im_pool_after(self.im_pool(f3.float().mean(dim=(2, 3), keepdim=True)).flatten(1))
        out = self.middle(f3)
        out += image[:, :, None, None].to(out.dtype)
        for *sides, after in self.branches:
            branch = None
            for side in sides:
                branch = side(f3, branch)
            out = after(branch, out)
        return out


def _product(after: Tensor, before: Tensor) -> Tensor:
    """Weights of the 1x1 convolution that equals `after` after `before`: [O, M, 1, 1], [M, I, 1, 1] -> [O, I, 1, 1]."""
    return (after.flatten(1) @ before.flatten(1))[:, :, None, None]
