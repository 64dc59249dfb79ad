"""Classification heads on the cosine between a descriptor and each class's weight.

`loss` is what training and validation call: descriptors [B, D] and labels [B] -> the mean cross-entropy and, for each
sample, by how many classes the true one is beaten. `forward` gives the scaled logits [B, classes], with the margin if
labels are given, else plain cosines; it is the same formula without the shortcuts of `margin_loss.py`. Both compute in
float32 at least, whatever autocast says: at s = 30 a bfloat16 cosine moves a logit by 0.1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.margin_loss import NoMargin, cosine_loss, margin_cross_entropy
from model.sharded import Shards, gather, gather_to_main, shard


class CosineHead(NoMargin, nn.Module):
    """s cos(theta): a softmax over cosines without margin. The base of the heads with a margin.

    With `sharded=(rank, world)`, `weight` is this rank's part of the class matrix, and must be kept out of DDP; labels
    still count over all classes. Its gradient is that of the mean loss over all ranks.
    """

    def __init__(self, dim: int, num_classes: int, *, scale: float, sharded: tuple[int, int] = (0, 1)):
        super().__init__()
        self.scale = scale
        self.num_classes = num_classes
        self.shards = Shards(num_classes, *sharded)
        full = torch.empty(num_classes, dim)
        nn.init.xavier_uniform_(full)  # the release never set it: at 81,313 classes that head stays dead
        self.weight = nn.Parameter(full if self.shards.world == 1 else self.shard(full).clone())
        self._gathered: Tensor | None = None

    def loss(self, descriptors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] over this rank's batch, and ranks int64 [B]; in eval mode over plain cosines.

        The error among the best k is `ranks >= k`. In training mode with a sharded weight it is a collective, and B
        must be equal on all ranks. In eval mode it talks to nobody, and a sharded head needs `gathered`.
        """
        if not self.training:
            return cosine_loss(descriptors, self.class_matrix(), labels, scale=self.scale)
        return margin_cross_entropy(descriptors, self.weight, labels, scale=self.scale, margin=self, shards=self.shards)

    def class_matrix(self) -> Tensor:
        """The weights of all classes [classes, D], without talking to other ranks."""
        if self.shards.world == 1:
            return self.weight
        assert self._gathered is not None, "a sharded head knows all classes only within gathered()"
        return self._gathered

    def full_weight(self) -> Tensor:
        """The weights of all classes [classes, D], without gradient. A collective when sharded."""
        return self.weight.detach() if self.shards.world == 1 else gather(self.weight, self.num_classes)

    def gather(self, rows: Tensor) -> Tensor | None:
        """A tensor of this rank's classes, such as `weight` or its momentum -> of all classes, for a checkpoint.

        When sharded it is a collective, and only rank 0 gets it, in CPU memory; the others get None.
        """
        return rows if self.shards.world == 1 else gather_to_main(rows, self.num_classes)

    def shard(self, full: Tensor) -> Tensor:
        """A tensor of all classes, of a checkpoint -> of this rank's classes."""
        return shard(full, self.shards.rank, self.shards.world)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all classes' weights for a while, as they are now, so that validation need not communicate."""
        self._gathered = None if self.shards.world == 1 else self.full_weight()
        try:
            yield
        finally:
            self._gathered = None

    def cosines(self, descriptors: Tensor) -> Tensor:
        """[B, D] -> cosines [B, classes] in [-1, 1], float32 or float64."""
        weight = self.class_matrix()
        at_least_float32 = torch.promote_types(torch.promote_types(descriptors.dtype, weight.dtype), torch.float32)
        descriptors, weight = descriptors.to(at_least_float32), weight.to(at_least_float32)
        return F.linear(F.normalize(descriptors), F.normalize(weight)).clamp(-1.0, 1.0)

    def forward(self, descriptors: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(descriptors.device.type, enabled=False):
            cosines = self.cosines(descriptors)
            if labels is not None:
                threshold, target = self.target(cosines.gather(1, labels[:, None]))
                cosines = self.weighed(cosines, threshold).scatter(1, labels[:, None], target)
            return cosines * self.scale

    def weighed(self, cosines: Tensor, threshold: Tensor) -> Tensor:
        """Cosines [B, classes] -> the values that stand for them if their class is not the true one."""
        return cosines


class ArcFaceHead(CosineHead):
    """s cos(theta_y + m) for the true class y (Deng et al., ArcFace, CVPR 2019, eq. 3).

    Where theta_y + m would pass pi, the target is cos(theta_y) - m sin(pi - m) instead, so that it keeps falling.
    """

    def __init__(self, dim: int, num_classes: int, *, scale: float, margin: float, sharded: tuple[int, int] = (0, 1)):
        super().__init__(dim, num_classes, scale=scale, sharded=sharded)
        self.margin = margin

    def target(self, cos_y: Tensor) -> tuple[Tensor, Tensor]:
        """cos(theta_y) -> cos(theta_y + m), and the same with the fallback past pi."""
        # The derivative of the root is infinite at 0. Below this bound its argument counts as constant.
        sin_y = (1.0 - cos_y.square()).clamp_min(1e-14).sqrt()
        cos_y_m = cos_y * math.cos(self.margin) - sin_y * math.sin(self.margin)
        past_pi = cos_y <= math.cos(math.pi - self.margin)
        return cos_y_m, torch.where(past_pi, cos_y - self.margin * math.sin(math.pi - self.margin), cos_y_m)


class CurricularFaceHead(ArcFaceHead):
    """ArcFace that weighs hard negatives by the training's progress t (Huang et al., CurricularFace, CVPR 2020, eq. 5).

    A cosine c above cos(theta_y + m) becomes c (t + c). `t` is the running mean of cos(theta_y), renewed before use,
    in training mode only, from the whole batch of all processes. This is the head of the published DOLG code, which
    calls it Arcface.
    """

    def __init__(self, dim: int, num_classes: int, *, scale: float, margin: float, sharded: tuple[int, int] = (0, 1)):
        super().__init__(dim, num_classes, scale=scale, margin=margin, sharded=sharded)
        self.t: Tensor
        self.register_buffer("t", torch.zeros(1))

    def target(self, cos_y: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self.update_t(cos_y.detach().mean())
        return super().target(cos_y)

    def weighed(self, cosines: Tensor, threshold: Tensor) -> Tensor:
        return torch.where(cosines > threshold, cosines * (self.t.to(cosines.dtype) + cosines), cosines)

    def negatives(self, cosines: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        hard = torch.gt(cosines, threshold, out=torch.empty_like(cosines))
        one = cosines.new_ones(())
        factor = torch.lerp(one, self.t.to(cosines.dtype) + cosines, hard)  # exact at the ends
        return cosines * factor, torch.lerp(one, factor + cosines, hard)

    def update_t(self, mean_cos_y: Tensor) -> None:
        sharded = self.shards.world > 1  # then cos_y comes from all ranks already
        if not sharded and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean_cos_y)
            mean_cos_y = mean_cos_y / dist.get_world_size()
        self.t.copy_(0.01 * mean_cos_y + 0.99 * self.t.to(mean_cos_y.dtype))


def build_head(
    kind: str, dim: int, num_classes: int, *, scale: float, margin: float, sharded: tuple[int, int] = (0, 1)
) -> CosineHead:
    """Make the head that `kind` names: arcface, curricularface or cosine. `sharded` is (rank, world)."""
    if kind == "cosine":
        return CosineHead(dim, num_classes, scale=scale, sharded=sharded)
    return {"arcface": ArcFaceHead, "curricularface": CurricularFaceHead}[kind](
        dim, num_classes, scale=scale, margin=margin, sharded=sharded
    )
