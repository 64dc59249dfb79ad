"""A moving average of the weights, which generalises better than the last of them."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class MovingAverage(Generic[Network]):
    """The exponential moving average of a network's parameters and of its buffers, in `network`.

    After update n the average a becomes d a + (1 - d) w with d = min(decay, (1 + n) / (10 + n)): it forgets the
    initial weights quickly (Polyak averaging as in Tan and Le, EfficientNet, and TensorFlow's
    ExponentialMovingAverage with `num_updates`). Buffers that are not floating point are copied.
    """

    def __init__(self, model: Network, decay: float):
        self.decay = decay
        self.model = model
        self.network = copy.deepcopy(model).eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take the weights after update `number` (from 1) in."""
        decay = min(self.decay, (1 + number) / (10 + number))
        averages, values = self._pairs()
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        for average, value in zip(self.network.buffers(), self.model.buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(value)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        averages, values = (
            [value for value in (*network.parameters(), *network.buffers()) if value.is_floating_point()]
            for network in (self.network, self.model)
        )
        return averages, values
