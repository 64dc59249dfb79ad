"""One update against plain autograd; what is left out when something is not finite."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.optimizer import build_adamw, build_sgd
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


def make(**settings) -> tuple[Network, TrainStep]:
    network = Network()
    common = {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.0}
    optimizer = build_sgd([{"params": list(network.named_parameters())}], lr=0.5, **common)
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


@pytest.mark.parametrize(("kind", "precision"), [("loss", "fp32"), ("loss", "fp16"), ("gradient", "fp32")])
def test_what_is_not_finite_stops_all_updates_from_there_on(kind, precision):
    network, step = make(precision=precision)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")  # no overflow of its own
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


@pytest.fixture
def poisoned(monkeypatch):
    """What torch allocates without setting it holds a large number, as memory that was in use does."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **settings: torch.full_like(tensor, 1e30, **settings))


SGD = {"momentum": 0.9, "nesterov": True}
DAMPED = {"momentum": 0.9, "dampening": 0.3}
ADAMW = {"betas": (0.9, 0.99)}


@pytest.mark.parametrize("look", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("settings", [SGD, DAMPED, ADAMW], ids=["sgd", "damped", "adamw"])
def test_updates_that_are_left_out_leave_no_trace(poisoned, settings, look):
    """The first and a later one, by the host or, as on a GPU, by the fused optimizer, which is called all the same."""
    network, twin = Network(), Network()
    named, common = [{"params": list(network.named_parameters())}], {"lr": 0.5, "weight_decay": 0.1}
    if settings is ADAMW:
        optimizer = build_adamw(named, **settings, **common)
        expected = torch.optim.AdamW(twin.parameters(), **settings, **common)
    else:
        optimizer = build_sgd(named, **{"dampening": 0.0, "nesterov": False} | settings, **common)
        expected = torch.optim.SGD(twin.parameters(), **settings, **common)
    step = TrainStep(network, optimizer, precision="fp16")
    step.look = look
    for seed in range(5):
        overflow = torch.inf if seed in (0, 3) else 1.0
        handle = network.linear.weight.register_hook(lambda gradient, factor=overflow: gradient * factor)
        step(*batch(seed))
        handle.remove()
        if overflow == 1.0:
            for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone()
            expected.step()
        assert_same(network, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu_a_bad_loss_holds_all_updates_too(precision):
    network, step = make(precision=precision)
    step.look = False
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")
    step(*batch(0), number=1)
    before = copy.deepcopy(network)
    images, labels = batch(1)
    images[3, 2] = torch.nan
    step(images, labels, number=2)
    step(*batch(2), number=3)
    assert step.first_bad.tolist() == [2, 1]
    assert_same(network, before, rtol=0, atol=0)


def test_a_gradient_too_long_to_measure_ends_a_float16_run_too():
    """Finite values whose norm overflows are no overflow of float16, and scaling the loss less would never help."""
    network, step = make(precision="fp16")
    network.linear.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    step(*batch(0), number=7)
    assert step.first_bad.tolist() == [7, 0]


def test_parts_of_a_batch_are_exchanged_once_also_when_compiled(tmp_path):
    """torch.compile wraps DDP, and only DDP knows how not to exchange."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for compiled in (False, True):
            network = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            step = TrainStep.__new__(TrainStep)
            step.network = torch.compile(network) if compiled else network
            with step._without_exchange():
                assert not network.require_backward_grad_sync
            assert network.require_backward_grad_sync
    finally:
        torch.distributed.destroy_process_group()
