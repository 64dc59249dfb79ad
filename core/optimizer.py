"""The optimiser: SGD over the parameters that are trained."""

from torch import nn
from torch.optim import SGD, Optimizer

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def build_sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    bn_weight_decay: float | None = None,
) -> SGD:
    """SGD with `weight_decay` on every parameter, or `bn_weight_decay` on those of batch norm where it is given."""
    of_bn = {id(p) for m in model.modules() if isinstance(m, BATCH_NORM) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}]
    if bn_weight_decay is not None:
        groups = [
            {"params": [p for p in trained if id(p) in of_bn], "weight_decay": bn_weight_decay},
            {"params": [p for p in trained if id(p) not in of_bn]},
        ]
    return SGD(groups, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
