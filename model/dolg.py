"""DOLG: an image -> one descriptor (Yang et al., DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of
Local and Global Features, ICCV 2021, https://arxiv.org/abs/2108.02927).

Parameter names are those of the published weights: globalmodel, localmodel, pool_g, fc_t, fc.
"""

from torch import Tensor, nn

from model.attention import LocalBranch
from model.fusion import orthogonal_fusion
from model.gem import GeM


class DOLG(nn.Module):
    """Descriptor network.

    Args:
        backbone: gives f3 and f4; what it has to have: `Backbone` in model/backbones.py.
        dim: dimension of the descriptor.
        with_ma: multi-atrous module in the local branch.
        fusion: `orthogonal` (DOLG), or `global` for GeM and `fc` alone, the baseline without local branch.
        gem_p: power of the generalised mean; trained from there if `gem_trainable`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 512,
        with_ma: bool = False,
        fusion: str = "orthogonal",
        gem_p: float = 3.0,
        gem_trainable: bool = True,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ):
        super().__init__()
        assert fusion in ("orthogonal", "global"), fusion
        f3_dim, f4_dim = backbone.widths[-2:]
        with_local = fusion == "orthogonal"
        # In the published order: the optimiser's state in a checkpoint knows the parameters by their number only.
        self.pool_g = GeM(gem_p, trainable=gem_trainable)
        self.fc_t = nn.Linear(f4_dim, f3_dim) if with_local else None
        self.fc = nn.Linear(2 * f3_dim if with_local else f4_dim, dim)
        self.globalmodel = backbone
        self.localmodel = None
        if with_local:
            self.localmodel = LocalBranch(f3_dim, with_ma=with_ma, bn_eps=bn_eps, bn_momentum=bn_momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised BGR images [B, 3, H, W] -> descriptors [B, dim], not normalised."""
        return self.fc(self.fused(images))

    def fused(self, images: Tensor) -> Tensor:
        """What `fc` reads: global and local half [B, 2 f3_dim], or for the global fusion [B, f4_dim]."""
        f3, f4 = self.globalmodel(images)
        pooled = self.pool_g(f4)
        if self.localmodel is None:
            return pooled
        local, _ = self.localmodel(f3)
        return orthogonal_fusion(local, self.fc_t(pooled))
