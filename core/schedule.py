"""Learning-rate schedules: pure functions of the epoch."""

import math

from core.base.errors import UserError


def learning_rate(
    epoch: float,
    *,
    policy: str,
    base_lr: float,
    max_epoch: int,
    steps: list[int] | tuple[int, ...] = (0,),
    lr_mult: float = 0.1,
    gamma: float = 0.1,
    warmup_epochs: int = 0,
    warmup_factor: float = 0.1,
) -> float:
    """The rate at `epoch` (zero-based).

    cos: base/2 (1 + cos(pi e/E)); steps: base * mult^k in stage k; exp: base * gamma^e. During the first
    `warmup_epochs` W the rate is multiplied by `factor (1 - e/W) + e/W` (Goyal et al., arXiv:1706.02677, section 2.2).
    """
    if policy == "cos":
        rate = 0.5 * base_lr * (1.0 + math.cos(math.pi * epoch / max_epoch))
    elif policy == "steps":
        stage = sum(start <= epoch for start in steps) - 1
        rate = base_lr * lr_mult**stage
    elif policy == "exp":
        rate = base_lr * gamma**epoch
    else:
        raise UserError(f"unknown learning-rate policy {policy}: use cos, steps or exp")
    if epoch < warmup_epochs:
        done = epoch / warmup_epochs
        rate *= warmup_factor * (1.0 - done) + done
    return rate
