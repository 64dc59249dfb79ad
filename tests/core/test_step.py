"""One update against plain autograd; what is left out when something is not finite."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.step import TrainStep


class Network(nn.Module):
    """Linear, without batch norm: parts of a batch give the gradient of the whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.linear(images).float()
        return F.cross_entropy(logits, labels), (logits > logits.gather(1, labels[:, None])).sum(dim=1)


def batch(seed: int = 1, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(4, (size,), generator=generator)


def make(fused: bool = True, **settings) -> tuple[Network, TrainStep]:
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True, fused=fused)
    return network, TrainStep(network, optimizer, **settings)


def plain(steps: int, *, clip: float = 0.0) -> tuple[Network, list[float]]:
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    losses = []
    for seed in range(steps):
        images, labels = batch(seed)
        loss = F.cross_entropy(network.linear(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            norm = torch.cat([p.grad.reshape(-1) for p in network.parameters()]).norm()
            for p in network.parameters():
                p.grad *= min(1.0, clip / norm.item())
        optimizer.step()
        losses.append(loss.item())
    return network, losses


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 12])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_updates_are_those_of_plain_autograd_in_however_many_parts(accumulate, clip):
    network, step = make(accumulate=accumulate, clip=clip)
    expected, losses = plain(4, clip=clip)
    got = [step(*batch(seed)) for seed in range(4)]
    assert [loss.item() for loss, _ in got] == pytest.approx(losses, rel=1e-5)
    assert all(len(ranks) == 12 and not loss.requires_grad for loss, ranks in got)
    assert_same(network, expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_before_do_not_count():
    network, step = make()
    network.linear.weight.grad = torch.full_like(network.linear.weight, 7.0)
    step(*batch(0))
    assert_same(network, plain(1)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_comes_near(precision):
    network, step = make(precision=precision)
    seen = []
    network.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = [step(*batch(seed))[0].item() for seed in range(3)]
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]] * 3
    expected, plain_losses = plain(3)
    assert losses == pytest.approx(plain_losses, rel=2e-2) and losses != plain_losses
    assert_same(network, expected, rtol=0.05, atol=2e-2)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_all_updates_from_there_on(kind):
    network, step = make()
    step(*batch(0), number=1)
    images, labels = batch(1)
    if kind == "loss":
        images[3, 2] = torch.nan
    else:
        network.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(network)
    step(images, labels, number=2, rank=5)
    assert step.first_bad.tolist() == ([2, 6] if kind == "loss" else [2, 0])
    step(*batch(2), number=3)
    assert step.first_bad[0] == 2
    assert_same(network, before, rtol=0, atol=0)


def test_a_fused_optimizer_leaves_an_update_out_on_the_device():
    """What a GPU relies on: found_inf 1 leaves weights alone, without the host's looking."""
    network, step = make()
    step(*batch(0))
    before = copy.deepcopy(network)
    for p in network.parameters():
        p.grad.fill_(torch.nan)
    step.optimizer.grad_scale, step.optimizer.found_inf = None, torch.ones(1)
    step.optimizer.step()
    assert_same(network, before, rtol=0, atol=0)
    step.optimizer.found_inf = torch.zeros(1)
    for p in network.parameters():
        p.grad.fill_(1.0)
    step.optimizer.step()
    assert not torch.equal(network.linear.bias, before.linear.bias)


def test_a_float16_gradient_that_overflows_costs_one_update_and_a_smaller_scale():
    network, step = make(precision="fp16")
    before, scale = copy.deepcopy(network), step.scaler.get_scale()
    handle = network.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    step(*batch(0))
    assert_same(network, before, rtol=0, atol=0)
    assert step.scaler.get_scale() == scale / 2 and step.first_bad[0] == 0
    handle.remove()
    step(*batch(1))
    assert not torch.equal(network.linear.weight, before.linear.weight)
