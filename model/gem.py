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
        self.p = nn.Parameter(torch.tensor([float(p)]), requires_grad=trainable)
        self.eps = eps

    def forward(self, maps: Tensor) -> Tensor:
        if maps.dtype in (torch.float16, torch.bfloat16):
            maps = maps.float()  # x^3 leaves the range of float16 at x = 41
        maps = maps.clamp(min=self.eps)
        # In units of the largest value. Else eps^p is 0 in float32 from p = 7.5 on, and the gradient of an empty
        # channel not a number. The result does not depend on the unit, which therefore counts as constant.
        unit = maps.detach().amax(dim=(2, 3), keepdim=True)
        return (maps / unit).pow(self.p).mean(dim=(2, 3)).pow(1.0 / self.p) * unit.flatten(1)
