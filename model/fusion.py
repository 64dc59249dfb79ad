"""Orthogonal fusion of the local descriptors with the global one."""

import torch
from torch import Tensor


def orthogonal_component(local: Tensor, global_: Tensor) -> Tensor:
    """Remove from local vectors their projection on the global vector (DOLG section 3.3, eq. 2 to 4).

    local [B, C] or [B, C, H, W], global_ [B, C] -> the shape of `local`.
    """
    g = global_.reshape(global_.shape + (1,) * (local.dim() - 2))
    squared_norm = g.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return local - (g * local).sum(dim=1, keepdim=True) / squared_norm * g


def orthogonal_fusion(local: Tensor, global_: Tensor) -> Tensor:
    """local [B, C, H, W], global_ [B, C] -> [B, 2C]: the global vector beside the pooled orthogonal part.

    The projection is linear, so pooling before it gives what pooling after it gives, without another map in memory.
    """
    if local.dtype in (torch.float16, torch.bfloat16):
        local = local.float()  # |g|^2 can leave the range of float16
    pooled = local.mean(dim=(2, 3))
    global_ = global_.to(pooled.dtype)
    return torch.cat([global_, orthogonal_component(pooled, global_)], dim=1)
