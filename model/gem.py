"""Generalised-mean pooling."""

import torch
from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised mean over space, [B, C, H, W] -> [B, C]: (mean of max(x, eps)^p)^(1/p).

    Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation (TPAMI 2019), eq. 2;
    DOLG section 3.2. `p` is stored in the weights whether it is trained or fixed.
    """

    def __init__(self, p: float = 3.0, *, trainable: bool = True, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p), requires_grad=trainable)
        self.eps = eps

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            if maps.dtype in (torch.float16, torch.bfloat16):
                maps = maps.float()  # x^3 leaves the range of float16 at x = 41
            return maps.clamp(min=self.eps).pow(self.p).mean(dim=(2, 3)).pow(1.0 / self.p)
