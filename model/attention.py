"""The local branch: optional multi-atrous module, then self-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.aspp import MultiAtrous
from model.resnet import init_convolutions


class LocalBranch(nn.Module):
    """Local descriptors weighted by a learnt attention map (DOLG section 3.2 and figure 3).

    Args:
        channels: channels of f3, kept.
        branch_channels: width of the multi-atrous module's branches.
        with_ma: put the multi-atrous module in front.
    """

    def __init__(
        self,
        channels: int,
        *,
        with_ma: bool,
        branch_channels: int = 512,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ):
        super().__init__()
        self.aspp = MultiAtrous(channels, channels, branch_channels=branch_channels) if with_ma else None
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(channels, 1, 1)
        init_convolutions(self)

    def forward(self, f3: Tensor) -> tuple[Tensor, Tensor]:
        """f3 [B, C, H, W] -> attended local descriptors [B, C, H, W] and the attention map [B, 1, H, W]."""
        if self.aspp is not None:
            f3 = self.aspp(f3)
        x = self.bn(self.conv1(f3))
        attention = F.softplus(self.conv2(F.relu(x)))
        # The descriptors are normalised before the ReLU, as released.
        return attention * F.normalize(x, dim=1), attention
