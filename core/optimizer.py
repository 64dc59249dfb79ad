"""The optimiser: SGD or AdamW over the parameters that are trained, in groups with their own rate and decay."""

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def parameter_groups(
    model: nn.Module,
    *,
    bn_weight_decay: float | None = None,
    head: nn.Module | None = None,
    head_lr_mult: float = 1.0,
) -> list[dict]:
    """Groups of the trained parameters: batch norm's where it has a decay of its own, the head's where it has a rate
    of its own (`lr_mult` times the others'), and the rest.
    """
    of_bn = {id(p) for m in model.modules() if isinstance(m, BATCH_NORM) for p in m.parameters(recurse=False)}
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    if bn_weight_decay is not None:
        groups.append({"params": [p for p in trained if id(p) in of_bn], "weight_decay": bn_weight_decay})
        trained = [p for p in trained if id(p) not in of_bn]
    if head_lr_mult != 1.0:
        groups.append({"params": [p for p in trained if id(p) in of_head], "lr_mult": head_lr_mult})
        trained = [p for p in trained if id(p) not in of_head]
    return [*groups, {"params": trained}]


def build_sgd(
    groups: list[dict], *, lr: float, momentum: float, dampening: float, nesterov: bool, weight_decay: float
) -> SGD:
    settings = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
    return SGD(groups, lr=lr, **settings, fused=True)


def build_adamw(groups: list[dict], *, lr: float, betas: list[float], weight_decay: float) -> AdamW:
    return AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
