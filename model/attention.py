"""The local branch: optional multi-atrous module, then self-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.aspp import MultiAtrous
from model.folding import FusedConv, How
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

    def arranged(self, how: How) -> "ArrangedLocalBranch":
        return ArrangedLocalBranch(self, how)


class ArrangedLocalBranch(nn.Module):
    """`LocalBranch` for inference, which is asked only for the mean of the local descriptors over space."""

    def __init__(self, local: LocalBranch, how: How):
        super().__init__()
        self.aspp = None if local.aspp is None else local.aspp.arranged(how)
        self.conv1 = FusedConv.of(local.conv1, local.bn, how=how)
        self.conv2 = nn.Linear(local.conv1.out_channels, 1)
        self.conv2.weight.copy_(local.conv2.weight.flatten(1))
        self.conv2.bias.copy_(local.conv2.bias)

    def forward(self, f3: Tensor) -> tuple[Tensor, None]:
        """f3 [B, C, H, W] -> the mean, float32 [B, C, 1, 1], and no attention map."""
        x = self.conv1(f3 if self.aspp is None else self.aspp(f3))
        x = x.permute(0, 2, 3, 1).flatten(1, 2).float()  # [B, H W, C]
        attention = F.softplus(self.conv2(F.relu(x)))
        # The maps themselves need not be normalised and weighed if the sum over them is.
        length = torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-12)
        return (((attention / length).mT @ x).squeeze(1) / x.shape[1])[:, :, None, None], None
