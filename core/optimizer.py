"""What is trained, and the optimiser: SGD or AdamW over groups of parameters with their own rate and decay."""

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def _never_compiled(kind: type[AnyOptimizer]) -> type[AnyOptimizer]:
    """The same optimizer without torch's wrappers that keep `torch.compile` out of it.

    They import the compiler at their first call, which takes seconds of every start. TRAIN.COMPILE compiles the
    network alone.
    """
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad", "step")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])  # one of those wrappers does that, too
    return type(kind.__name__, (kind,), methods)


SGD = _never_compiled(torch.optim.SGD)
AdamW = _never_compiled(torch.optim.AdamW)


class Frozen:
    """Holds the submodules `stages` of a backbone still, and with `batch_norm` all of its batch norm."""

    def __init__(self, backbone: nn.Module, *, stages: Sequence[str] = (), batch_norm: bool = False):
        still = [backbone.get_submodule(name) for name in stages]
        if batch_norm:
            still += [module for module in backbone.modules() if isinstance(module, BATCH_NORM)]
        for module in still:
            module.requires_grad_(False)
        self.layers = [m for module in still for m in module.modules() if isinstance(m, BATCH_NORM)]

    def keep_statistics(self) -> None:
        """Call after `model.train()`: frozen batch norm computes with its running statistics and leaves them alone."""
        for layer in self.layers:
            layer.eval()


def parameter_groups(
    model: nn.Module,
    *,
    bn_weight_decay: float | None = None,
    head: nn.Module | None = None,
    head_lr_mult: float = 1.0,
) -> list[dict]:
    """Groups of the trained parameters as (name, parameter): batch norm's where it has a decay of its own, the head's
    where it has a rate of its own (`lr_mult` times the others'), and the rest. None of them is empty.
    """
    of_bn = {id(p) for m in model.modules() if isinstance(m, BATCH_NORM) for p in m.parameters(recurse=False)}
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    if bn_weight_decay is not None:
        groups.append({"params": [(n, p) for n, p in trained if id(p) in of_bn], "weight_decay": bn_weight_decay})
        trained = [(n, p) for n, p in trained if id(p) not in of_bn]
    if head_lr_mult != 1.0:
        groups.append({"params": [(n, p) for n, p in trained if id(p) in of_head], "lr_mult": head_lr_mult})
        trained = [(n, p) for n, p in trained if id(p) not in of_head]
    return [group for group in [*groups, {"params": trained}] if group["params"]]


def build_sgd(
    groups: list[dict], *, lr: float, momentum: float, dampening: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    optimizer = SGD(
        groups,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        fused=True,
    )
    if momentum:
        # Left to itself the fused kernel allocates momentum without setting it, and fills it in the first step. Where
        # that step is left out on the device (a float16 overflow, say), the next takes what the memory held.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if dampening:
            _begin_undamped(optimizer, dampening)
    return optimizer


def _begin_undamped(optimizer: Optimizer, dampening: float) -> None:
    """Let the first step that counts take the gradient whole, as SGD without a momentum yet does."""

    def before_step(*_: object) -> None:
        begun = any(entry["momentum_buffer"].any() for entry in optimizer.state.values())
        for group in optimizer.param_groups:
            group["dampening"] = dampening if begun else 0.0
        if begun:
            hook.remove()

    hook = optimizer.register_step_pre_hook(before_step)


def build_adamw(groups: list[dict], *, lr: float, betas: list[float], weight_decay: float) -> torch.optim.AdamW:
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
