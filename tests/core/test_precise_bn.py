import concurrent.futures
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from core import precise_bn as precise
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
        [torch.randn(n, 3, 4, 4, dtype=torch.float64) * 3 + shift for n, shift in ((6, 0), (6, 2), (6, -1), (2, 3))]
    )


def seen_by(model: WithHead, batches: list[torch.Tensor]) -> list[np.ndarray]:
    """Everything that each layer is given, batch after batch: float64 [values, 3] for the first and the second."""
    seen = [[], []]
    for batch in batches:
        x = batch.transpose(0, 1).reshape(3, -1)
        normal = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = model.first.weight[:, None] * normal + model.first.bias[:, None]
        y = y.reshape(3, len(batch), -1).relu().mean(dim=2)
        for inputs, values in zip(seen, (x, y), strict=True):
            inputs.append(values.detach().numpy().T)
    return [np.concatenate(inputs) for inputs in seen]


def check_exact(model: WithHead, batches: list[torch.Tensor], *, tolerance: float = 1e-10) -> None:
    """Hold the statistics to NumPy's, which takes two passes over all values at once."""
    for layer, values in zip((model.first, model.second), seen_by(model, batches), strict=True):
        np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(axis=0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(layer.running_var.numpy(), values.var(axis=0), rtol=tolerance)


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_the_statistics_are_those_of_all_values_together(loader, batches):
    """Also where the last batch is smaller."""
    model = WithHead().double()
    model.first.running_mean.fill_(100.0)  # what was there before does not count
    model.first.running_var.fill_(7.0)
    update_precise_bn(model, loader, batches=batches)
    check_exact(model, loader.batches[:batches])


def test_values_far_from_zero_keep_their_variance():
    """A mean 1,000 times the deviation, in float32: its squares hide the variance."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1000).float() for _ in range(8)]
    model = nn.BatchNorm2d(3)
    update_precise_bn(model, Loader(batches), batches=8)
    exact = torch.cat(batches).double().numpy()
    np.testing.assert_allclose(model.running_var.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-4)


def test_the_numbers_of_fvcore(loader):
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn", reason="NOT CHECKED: pip install fvcore")
    ours, theirs = WithHead().double(), WithHead().double()
    theirs.load_state_dict(ours.state_dict())
    update_precise_bn(ours, loader, batches=4)
    theirs.train().frozen.eval()  # it takes no layer without running statistics
    precise_bn.update_bn_stats(theirs, loader.batches, num_iters=4)
    for layer in ("first", "second"):
        a, b = getattr(ours, layer), getattr(theirs, layer)
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sync", [False, True])
def test_processes_with_unequal_shares_end_with_the_statistics_of_all(loader, monkeypatch, sync):
    """Two processes, here two threads, whose second batches have 5 and 2 images. `sync`: each layer's statistics of a
    batch are those of both parts together, as SyncBatchNorm's are."""
    shares = [[loader.batches[0], loader.batches[1][:5]], [loader.batches[2], loader.batches[3]]]
    together, turn = {}, threading.Barrier(2)
    rank = threading.local()

    def summed(tensor):
        together[rank.number] = tensor.clone()
        turn.wait()
        tensor.copy_(together[0] + together[1])
        turn.wait()
        return tensor

    class Synchronised(nn.SyncBatchNorm):
        """Its arithmetic on the CPU, which it refuses."""

        def forward(self, x):
            count, total = torch.tensor(float(x.numel() // 3)), x.sum(dim=(0, 2, 3))
            n, mean = summed(count), summed(total) / count
            squares = summed((x - mean[:, None, None]).square().sum(dim=(0, 2, 3)))
            self.running_mean.copy_(mean)
            self.running_var.copy_(squares / (n - 1))
            return x

    monkeypatch.setattr(precise, "all_reduce_sum", summed)
    models = [Synchronised(3).double() if sync else nn.BatchNorm2d(3).double() for _ in shares]

    def process(number):
        rank.number = number
        update_precise_bn(models[number], Loader(shares[number]), batches=2)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2), timeout=60))
    exact = torch.cat([*shares[0], *shares[1]]).numpy()
    for model in models:
        np.testing.assert_allclose(model.running_mean.numpy(), exact.mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(model.running_var.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-12)


def test_under_autocast_the_statistics_stay_float32(loader):
    """bf16 values have 3 digits, and their statistics more: of what the layer is given they are exact."""
    given = []
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda layer, inputs, output: given.append(output.detach().double()))
    batches = [batch.float() for batch in loader.batches]
    with torch.autocast("cpu", torch.bfloat16):
        update_precise_bn(model, Loader(batches), batches=4)
    exact = torch.cat(given).numpy()
    assert model[1].running_var.dtype == torch.float32
    np.testing.assert_allclose(model[1].running_var.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(model[1].running_mean.numpy(), exact.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_layer_that_sees_nothing_keeps_its_statistics_and_one_that_is_used_twice_counts_twice(loader):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.twice(x) + self.twice(5 * x)

    model = Shared().double()
    model.never.running_mean.fill_(3.0)
    update_precise_bn(model, loader, batches=4)
    exact = torch.cat([part for batch in loader.batches for part in (batch, 5 * batch)]).numpy()
    np.testing.assert_allclose(model.twice.running_var.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-10)
    assert model.never.running_mean.eq(3).all() and model.never.running_var.eq(1).all()


@pytest.mark.parametrize(("asked", "drawn"), [(0, 1), (1, 1), (2, 2), (99, 4)])
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
