"""Head and network of the published DOLG code, as plainly as it was written: what ours is timed and checked against.

It is CurricularFace under the name Arcface, with the published defects that show only at the edges: `t` is renewed in
eval mode too and from this process's batch alone, and gradients at a cosine of exactly 1 or -1 are not finite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dolg import DOLG


class PublishedHead(nn.Module):
    """Descriptors [B, D], labels [B] -> logits [B, classes], for F.cross_entropy. Boolean masks and all."""

    def __init__(self, dim: int, num_classes: int, *, scale: float, margin: float):
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.xavier_uniform_(self.weight)  # as ours; the published code leaves it as the memory was
        self.t: Tensor
        self.register_buffer("t", torch.zeros(1))

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(descriptors), F.normalize(self.weight)).clamp(-1, 1)
        cos_y = cosines[torch.arange(len(labels), device=labels.device), labels][:, None]
        sin_y = torch.sqrt(1 - cos_y**2)
        cos_y_m = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)
        past_pi = cos_y <= math.cos(math.pi - self.margin)
        target = torch.where(past_pi, cos_y - self.margin * math.sin(math.pi - self.margin), cos_y_m)
        hard = cosines > cos_y_m
        hard_cosines = cosines[hard]
        with torch.no_grad():
            self.t = 0.01 * cos_y.mean() + 0.99 * self.t
        cosines[hard] = hard_cosines * (self.t + hard_cosines)
        return cosines.scatter(1, labels[:, None], target) * self.scale


class PublishedClassifier(nn.Module):
    """The published network around the parts that we compute in the same way: backbone, GeM, local branch.

    Orthogonal fusion as released: the projection is taken from every position, and the rest is pooled.
    """

    def __init__(self, descriptor: DOLG, head: PublishedHead):
        super().__init__()
        self.descriptor = descriptor
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images [B, 3, H, W], labels [B] -> logits [B, classes]."""
        return self.head(self.describe(images), labels)

    def describe(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> descriptors [B, dim]."""
        net = self.descriptor
        assert net.localmodel is not None and net.fc_t is not None
        f3, f4 = net.globalmodel(images)
        local, _ = net.localmodel(f3)
        g = net.fc_t(net.pool_g(f4))
        products = torch.bmm(g.unsqueeze(1), local.flatten(2))
        projection = torch.bmm(g.unsqueeze(2), products).view(local.shape)
        projection = projection / (torch.norm(g, p=2, dim=1) ** 2).view(-1, 1, 1, 1)
        orthogonal = F.adaptive_avg_pool2d(local - projection, 1).flatten(1)
        return net.fc(torch.cat([g, orthogonal], dim=1))
