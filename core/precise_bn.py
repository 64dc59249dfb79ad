"""Batch-norm statistics of many images with the weights held still: the population's, not an average of batches'."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from core.optimizer import BATCH_NORM
from core.processes.distributed import all_reduce_sum


class Batches(Protocol):
    """Of images on the model's device."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@torch.no_grad()
def update_precise_bn(
    model: nn.Module,
    loader: Batches,
    *,
    batches: int,
    forward: Callable[[Tensor], object] | None = None,
    leave: Collection[nn.Module] = (),
    watch: Callable[[Iterable], Iterator] = iter,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Replace every BN's running mean and variance by those of all values it sees in `batches` batches of `loader`.

    Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 and appendix. The running average lags
    behind the weights; this does not. A collective call: every process uses its share, and all end with the same
    numbers. `loader` yields batches with `images` on the model's device; `forward(images)` runs the part of the model
    that has batch norm (by default all of it). The layers in `leave`, and other state that a forward
    in training mode changes (the head's), are left as they were. What `poll` raises before a batch, or `watch` in
    place of one, leaves all of them as they were.
    """
    tracking = (m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats)
    layers: list[_BatchNorm] = [m for m in tracking if m not in set(leave)]
    if not layers:
        return
    was_training = model.training
    model.eval()
    try:
        with _collecting(layers) as populations:
            for batch in itertools.islice(watch(loader), min(max(batches, 1), len(loader))):
                poll()
                (forward or model)(batch.images)
    finally:
        model.train(was_training)
    for layer, population in zip(layers, populations, strict=True):
        population.write(layer)


@contextlib.contextmanager
def _collecting(layers: list[_BatchNorm]) -> Iterator[list["_Population"]]:
    """Let `layers` normalise by their batch and hand its statistics to a population each; afterwards they are as
    before."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [(layer.momentum, [getattr(layer, name).clone() for name in names]) for layer in layers]
    populations = [_Population(_statistics(layer)[0]) for layer in layers]
    hooks = [layer.register_forward_hook(population.add) for layer, population in zip(layers, populations, strict=True)]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # the running statistics become those of the batch
    try:
        yield populations
    finally:
        for hook in hooks:
            hook.remove()
        for layer, (momentum, values) in zip(layers, before, strict=True):
            layer.momentum = momentum
            for name, value in zip(names, values, strict=True):
                getattr(layer, name).copy_(value)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance."""
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None and variance is not None, "a layer that keeps no statistics"
    return mean, variance


class _Population:
    """Mean and variance of all values of each channel, from those of batches that may differ in size.

    The variance between batches belongs to it: averaging the batches' variances alone is 10 % short at two photographs
    a batch.
    """

    def __init__(self, like: Tensor):
        # In float64, where E[x^2] - E[x]^2 loses nothing of what float32 holds.
        self.count = torch.zeros((), dtype=torch.float64, device=like.device)
        self.total, self.squares = (torch.zeros_like(like, dtype=torch.float64) for _ in range(2))

    def add(self, layer: _BatchNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        """Take a batch in: a forward hook of `layer`, whose momentum is 1."""
        values = inputs[0].numel() // inputs[0].shape[1]
        count = torch.full_like(self.count, values)
        if isinstance(layer, nn.SyncBatchNorm):
            all_reduce_sum(count)  # its statistics are those of all processes' parts together
        mean, variance = (value.double() for value in _statistics(layer))
        self.count += count
        self.total += count * mean
        # PyTorch keeps the unbiased variance, with a divisor of count - 1.
        self.squares += (count - 1) * variance + count * mean.square()

    def write(self, layer: _BatchNorm) -> None:
        """Give `layer` the statistics over all processes; a collective call. One that saw nothing keeps its own."""
        count = all_reduce_sum(self.count)
        mean = all_reduce_sum(self.total) / count
        variance = all_reduce_sum(self.squares) / count - mean.square()
        for kept, new in zip(_statistics(layer), (mean, variance.clamp_min(0.0)), strict=True):
            kept.copy_(torch.where(count > 0, new, kept))
