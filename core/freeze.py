"""Parts of the backbone that training leaves as they are."""

from torch import nn

from core.optimizer import BATCH_NORM

STAGES = ("stem", "s1", "s2", "s3", "s4")


class Frozen:
    """Holds the first `stages` of STAGES still, and with `batch_norm` all batch norm of the backbone."""

    def __init__(self, backbone: nn.Module, *, stages: int = 0, batch_norm: bool = False):
        still = [backbone.get_submodule(name) for name in STAGES[:stages]]
        if batch_norm:
            still += [module for module in backbone.modules() if isinstance(module, BATCH_NORM)]
        for module in still:
            module.requires_grad_(False)
        self.layers = [m for module in still for m in module.modules() if isinstance(m, BATCH_NORM)]

    def keep_statistics(self) -> None:
        """Call after `model.train()`: frozen batch norm computes with its running statistics and leaves them alone."""
        for layer in self.layers:
            layer.eval()
