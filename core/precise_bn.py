"""Batch-norm statistics averaged over many images with the weights held still."""

import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader

from core.distributed import all_reduce_sum, world_size
from core.optimizer import BATCH_NORM


@torch.no_grad()
def update_precise_bn(model: nn.Module, loader: DataLoader, device: torch.device, *, batches: int) -> None:
    """Replace every BN's running mean and variance by the average over `batches` batches of `loader`.

    Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3. The running average lags behind the
    weights; this does not. A collective call: every process uses its share, and all end with the same numbers.
    Other state that a forward in training mode changes (the head's) is left as it was.
    """
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
    if not layers:
        return
    batches = min(max(batches, 1), len(loader))
    momenta = [layer.momentum for layer in layers]
    sums = [(torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)) for layer in layers]
    was_training = model.training
    model.eval()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # the running statistics become those of the batch
    for batch, *_ in itertools.islice(loader, batches):
        model(batch.to(device))
        for layer, (mean, var) in zip(layers, sums, strict=True):
            mean += layer.running_mean
            var += layer.running_var
    for layer, momentum, (mean, var) in zip(layers, momenta, sums, strict=True):
        layer.momentum = momentum
        layer.running_mean.copy_(all_reduce_sum(mean) / (batches * world_size()))
        layer.running_var.copy_(all_reduce_sum(var) / (batches * world_size()))
    model.train(was_training)
