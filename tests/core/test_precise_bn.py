from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.precise_bn import update_precise_bn


class Loader:
    """Batches of images, with what else a real loader yields."""

    def __init__(self, batches: list[torch.Tensor]):
        self.batches = batches
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.drawn += 1
            yield SimpleNamespace(images=batch, labels=torch.zeros(len(batch)))


class WithHead(nn.Module):
    """Two batch norms, the second behind the first, and a buffer that training mode changes as the head's does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3, momentum=0.1), nn.BatchNorm1d(3, momentum=0.3)
        self.frozen = nn.BatchNorm1d(3, track_running_stats=False)
        self.head = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(1))
        nn.init.normal_(self.first.weight)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.head(self.frozen(self.second(self.first(x).relu().mean(dim=(2, 3)))))


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return Loader(
        [torch.randn(size, 3, 4, 4, dtype=torch.float64) * 3 + shift for size, shift in ((6, 0), (6, 2), (6, -1))]
    )


def literal_statistics(model: WithHead, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Mean and unbiased variance of each layer's input, every batch for itself, averaged; written out with loops."""
    sums = [torch.zeros(3, dtype=torch.float64) for _ in range(4)]
    for batch in batches:
        x = batch.transpose(0, 1).reshape(3, -1)
        statistics = [x.mean(dim=1), x.var(dim=1, unbiased=True)]
        normal = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = model.first.weight[:, None] * normal + model.first.bias[:, None]
        y = y.reshape(3, len(batch), -1).relu().mean(dim=2)
        statistics += [y.mean(dim=1), y.var(dim=1, unbiased=True)]
        for i, value in enumerate(statistics):
            sums[i] += value / len(batches)
    return sums


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_statistics_are_those_of_the_batches_averaged(loader, batches):
    model = WithHead().double()
    model.first.running_mean.fill_(100.0)  # what was there before does not count
    model.first.running_var.fill_(7.0)
    update_precise_bn(model, loader, batches=batches)
    got = [s for bn in (model.first, model.second) for s in (bn.running_mean, bn.running_var)]
    for value, expected in zip(got, literal_statistics(model, loader.batches[:batches]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("asked", "drawn"), [(0, 1), (1, 1), (2, 2), (99, 3)])
def test_at_least_one_batch_and_at_most_an_epoch(loader, asked, drawn):
    update_precise_bn(WithHead().double(), loader, batches=asked)
    assert loader.drawn == drawn


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_left_as_it_was(loader, training):
    model = WithHead().double().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" not in key}
    update_precise_bn(model, loader, batches=3)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.seen == 0
    assert (model.first.momentum, model.second.momentum) == (0.1, 0.3)
    assert [m.training for m in model.modules()] == [training] * 5
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_batch_norm_draws_nothing(loader):
    update_precise_bn(nn.Conv2d(3, 3, 1), loader, batches=3)
    assert loader.drawn == 0


def test_an_interrupted_pass_leaves_the_statistics_of_before(loader):
    model = WithHead().double()
    model.first.running_mean.fill_(100.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_precise_bn(model, loader, batches=3, poll=poll)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert (model.first.momentum, model.training) == (0.1, True)


def test_layers_may_be_left_alone(loader):
    model = WithHead().double()
    update_precise_bn(model, loader, batches=3, leave=[model.first])
    assert model.first.running_mean.eq(0).all() and model.first.running_var.eq(1).all()
    assert not model.second.running_mean.eq(0).any()
