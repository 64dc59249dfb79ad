"""Classification heads on the cosine between a descriptor and each class's weight.

All take descriptors [B, D] and labels [B] and return scaled logits [B, classes] for a cross-entropy loss; without
labels they return the plain cosines times the scale, as validation needs them. They compute in float32 at least,
whatever autocast says: at s = 30 a bfloat16 cosine moves a logit by 0.1.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """s cos(theta): a softmax over cosines without margin. The base of the heads with a margin."""

    def __init__(self, dim: int, num_classes: int, *, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.xavier_uniform_(self.weight)  # the release never set it: at 81,313 classes that head stays dead

    def cosines(self, descriptors: Tensor) -> Tensor:
        """[B, D] -> cosines [B, classes] in [-1, 1], float32 or float64."""
        at_least_float32 = torch.promote_types(torch.promote_types(descriptors.dtype, self.weight.dtype), torch.float32)
        descriptors, weight = descriptors.to(at_least_float32), self.weight.to(at_least_float32)
        return F.linear(F.normalize(descriptors), F.normalize(weight)).clamp(-1.0, 1.0)

    def forward(self, descriptors: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(descriptors.device.type, enabled=False):
            cosines = self.cosines(descriptors)
            if labels is not None:
                cosines = self.apply_margin(cosines, labels)
            return cosines * self.scale

    def apply_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Cosines [B, classes] -> the values the loss sees in their place."""
        return cosines


class ArcFaceHead(CosineHead):
    """s cos(theta_y + m) for the true class y (Deng et al., ArcFace, CVPR 2019, eq. 3).

    Where theta_y + m would pass pi, the target is cos(theta_y) - m sin(pi - m) instead, so that it keeps falling.
    """

    def __init__(self, dim: int, num_classes: int, *, scale: float, margin: float):
        super().__init__(dim, num_classes, scale=scale)
        self.margin = margin

    def apply_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        _, target = self.target_with_margin(cosines, labels)
        return cosines.scatter(1, labels[:, None], target)

    def target_with_margin(self, cosines: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """cos(theta_y + m) [B, 1], and the same with the fallback past pi [B, 1]."""
        cos_y = cosines.gather(1, labels[:, None])
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

    def __init__(self, dim: int, num_classes: int, *, scale: float, margin: float):
        super().__init__(dim, num_classes, scale=scale, margin=margin)
        self.register_buffer("t", torch.zeros(1))

    def apply_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        cos_y_m, target = self.target_with_margin(cosines, labels)
        if self.training:
            self.update_t(cosines.detach().gather(1, labels[:, None]).mean())
        hard = torch.where(cosines > cos_y_m, cosines * (self.t.to(cosines.dtype) + cosines), cosines)
        return hard.scatter(1, labels[:, None], target)

    def update_t(self, mean_cos_y: Tensor) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean_cos_y)
            mean_cos_y = mean_cos_y / dist.get_world_size()
        self.t.copy_(0.01 * mean_cos_y + 0.99 * self.t.to(mean_cos_y.dtype))


def build_head(kind: str, dim: int, num_classes: int, *, scale: float, margin: float) -> CosineHead:
    """Make the head that `kind` names: arcface, curricularface or cosine."""
    if kind == "cosine":
        return CosineHead(dim, num_classes, scale=scale)
    return {"arcface": ArcFaceHead, "curricularface": CurricularFaceHead}[kind](
        dim, num_classes, scale=scale, margin=margin
    )
