"""Batch-norm statistics averaged over many images with the weights held still."""

import itertools
from collections.abc import Callable, Collection, Sized

import torch
from torch import Tensor, nn

from core.distributed import all_reduce_sum, world_size
from core.optimizer import BATCH_NORM


@torch.no_grad()
def update_precise_bn(
    model: nn.Module,
    loader: Sized,
    *,
    batches: int,
    forward: Callable[[Tensor], object] | None = None,
    leave: Collection[nn.Module] = (),
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Replace every BN's running mean and variance by the average over `batches` batches of `loader`.

    Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3. The running average lags behind the
    weights; this does not. A collective call: every process uses its share, and all end with the same numbers.
    `loader` yields batches with `images` on the model's device; `forward(images)` runs the part of the model that has
    batch norm (by default all of it). The layers in `leave`, and other state that a forward
    in training mode changes (the head's), are left as they were. What `poll` raises before a batch leaves all of them
    as they were.
    """
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats and m not in set(leave)]
    if not layers:
        return
    batches = min(max(batches, 1), len(loader))
    before = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    counts = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in before]
    was_training = model.training
    model.eval()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # the running statistics become those of the batch
    try:
        for batch in itertools.islice(loader, batches):
            poll()
            (forward or model)(batch.images)
            for layer, (mean, var) in zip(layers, sums, strict=True):
                mean += layer.running_mean
                var += layer.running_var
    except BaseException:
        for layer, (mean, var) in zip(layers, before, strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
        raise
    finally:
        for layer, (momentum, tracked) in zip(layers, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)
        model.train(was_training)
    for layer, (mean, var) in zip(layers, sums, strict=True):
        layer.running_mean.copy_(all_reduce_sum(mean) / (batches * world_size()))
        layer.running_var.copy_(all_reduce_sum(var) / (batches * world_size()))
