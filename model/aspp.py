"""The multi-atrous module of the local branch."""

import torch
from torch import Tensor, nn

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
