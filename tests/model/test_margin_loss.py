"""The loss in two passes against autograd of the heads' plain formula, and its ranks against sorting."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import margin_loss
from model.margin import CosineHead, build_head
from model.margin_loss import cosine_loss

KINDS = ["cosine", "arcface", "curricularface"]
CLASSES, DIM = 37, 6


@pytest.fixture(params=[5, 1 << 17], ids=["blocks", "one block"])
def blocks(request, monkeypatch) -> None:
    """Classes in several blocks, the last one shorter, and in a single one as on a GPU."""
    monkeypatch.setattr(margin_loss, "CPU_BLOCK", request.param)


def make(kind: str, *, classes: int = CLASSES, scale: float = 30.0, dtype: torch.dtype = torch.float64) -> CosineHead:
    torch.manual_seed(0)
    head = build_head(kind, DIM, classes, scale=scale, margin=0.3).to(dtype).train()
    if kind == "curricularface":
        head.t.fill_(0.2)
    return head


def batch(head: CosineHead, size: int = 9) -> tuple[Tensor, Tensor]:
    """Random descriptors, one near its class, one opposite to it (past pi), one near another class."""
    weight = head.weight.detach()
    x = torch.randn(size, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(weight.dtype)
    labels = torch.randint(len(weight), (size,), generator=torch.Generator().manual_seed(2))
    labels[4] = labels[3]  # a class may occur twice
    x[0] = 2 * weight[labels[0]] + 1e-2 * x[0]
    x[1] = -3 * weight[labels[1]] + 1e-2 * x[1]
    x[2] = weight[labels[2] - 1] + 1e-2 * x[2]
    return x, labels


def plain(head: CosineHead, x: Tensor, labels: Tensor, *, upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss, ranks and gradients in float64, by autograd and by sorting."""
    head = head.double()
    head.weight.grad = None
    x = x.detach().double().requires_grad_()
    logits = head(x, labels if head.training else None)
    loss = F.cross_entropy(logits, labels)
    (upstream * loss).backward()
    ranks = (logits.sort(dim=1, descending=True, stable=True).indices == labels[:, None]).nonzero()[:, 1]
    result = {"loss": loss.detach(), "ranks": ranks, "x": x.grad, "weight": head.weight.grad}
    return result | ({"t": head.t.clone()} if hasattr(head, "t") else {})


def ours(head: CosineHead, x: Tensor, labels: Tensor, *, upstream: float = 1.0) -> dict[str, Tensor]:
    head.weight.grad = None
    x = x.detach().requires_grad_()
    loss, ranks = head.loss(x, labels)
    (upstream * loss).backward()
    result = {"loss": loss.detach(), "ranks": ranks, "x": x.grad, "weight": head.weight.grad}
    return result | ({"t": head.t.clone()} if hasattr(head, "t") else {})


def assert_equal_within(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each, and t, a mean of cosines, to 1."""
    assert list(found) == list(want)
    for name, value in want.items():
        assert found[name].shape == value.shape, name
        if name == "ranks":
            assert found[name].dtype == torch.int64
            assert torch.equal(found[name], value)
        else:
            largest = 1.0 if name == "t" else value.abs().max()
            assert (found[name] - value).abs().max() <= tolerance * largest, name


# ------------------------------------------------------------------------------------------------------ plain formula


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("blocks")
def test_equals_autograd_of_the_formula_in_float64(kind, training):
    x, labels = batch(make(kind))
    found = ours(make(kind).train(training), x, labels, upstream=3.0)
    assert_equal_within(found, plain(make(kind).train(training), x, labels, upstream=3.0), 1e-12)
    assert len(set(found["ranks"].tolist())) > 3  # not all alike
    if kind == "curricularface":
        assert (found["t"] == 0.2).item() != training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 8, 64])
def test_within_a_millionth_in_float32(kind, size, monkeypatch):
    """As in training: thousands of classes, descriptors of no class in particular."""
    monkeypatch.setattr(margin_loss, "CPU_BLOCK", 1000)
    torch.manual_seed(size)
    head = build_head(kind, 512, 5003, scale=30.0, margin=0.15)
    x, labels = torch.randn(size, 512), torch.randint(5003, (size,))
    found = ours(head, x, labels)
    if kind == "curricularface":
        head.t.zero_()
    assert_equal_within(found, plain(head, x, labels), 1e-6)


def test_eval_mode_knows_no_margin_and_needs_no_head():
    head = make("curricularface").eval()
    x, labels = batch(head)
    loss, ranks = head.loss(x, labels)
    with torch.inference_mode():
        again, again_ranks = cosine_loss(x, head.weight, labels, scale=30.0)
    cosine = make("cosine")
    assert torch.equal(loss, again) and torch.equal(ranks, again_ranks)
    assert torch.equal(loss, cosine.loss(x, labels)[0])
    assert not torch.equal(loss, head.train().loss(x, labels)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_wanted(kind):
    x, labels = batch(make(kind))
    want = make(kind).loss(x, labels)
    with torch.no_grad():
        found = make(kind).loss(x, labels)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert want[0].requires_grad and not found[0].requires_grad
    assert not want[1].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_side_alone(kind):
    x, labels = batch(make(kind))
    want = ours(make(kind), x, labels)
    head = make(kind)
    head.loss(x, labels)[0].backward()  # descriptors of a frozen network
    assert torch.equal(head.weight.grad, want["weight"])
    head = make(kind)
    head.weight.requires_grad_(False)
    x = x.requires_grad_()
    head.loss(x, labels)[0].backward()
    assert torch.equal(x.grad, want["x"]) and head.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("blocks")
def test_gradients_add_up(kind):
    """Several forward passes before one backward pass, a graph that is used twice, and accumulation."""
    head = make(kind)
    x, labels = batch(head)
    alone = [ours(head, x, labels), ours(head, x + 0.1, labels)]
    head = make(kind)
    first, second = head.loss(x, labels)[0], head.loss(x + 0.1, labels)[0]
    first.backward(retain_graph=True)
    (first + second).backward()
    torch.testing.assert_close(head.weight.grad, 2 * alone[0]["weight"] + alone[1]["weight"])


# ------------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("blocks")
def test_equal_logits_count_by_index(kind):
    head = make(kind, classes=20)
    rows = torch.eye(DIM)[torch.tensor([0, 1, 2, 1, 0, 1, 3, 1, 2, 4] * 2)]
    head.load_state_dict({**head.state_dict(), "weight": rows})
    # All cosines are 0, 1, or the target; in eval mode the classes 1, 3, 5, 7, 11, ... are equal for the second axis.
    x = torch.eye(DIM, dtype=torch.float64)[[1] * 8 + [5] * 3]
    labels = torch.tensor([1, 3, 5, 7, 11, 13, 15, 17, 0, 7, 19])
    assert head.eval().loss(x, labels)[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 7, 19]
    other = make(kind, classes=20)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.loss(x, labels)[1], plain(head.train(), x, labels)["ranks"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("blocks")
def test_what_is_not_a_number_counts_as_beaten_by_all(kind, training):
    head = make(kind).train(training)
    x, labels = batch(head)
    x[3] = torch.nan
    loss, ranks = head.loss(x, labels)
    assert loss.isnan()
    assert ranks[3] == CLASSES
    if not training or kind != "curricularface":  # there t makes all hard negatives NaN
        assert torch.equal(ranks[5:], make(kind).train(training).loss(batch(head)[0], labels)[1][5:])


# ------------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("blocks")
def test_finite_at_cosines_of_exactly_one_and_for_vectors_of_length_zero(kind, dtype):
    head = make(kind, classes=7, dtype=dtype)
    head.load_state_dict({**head.state_dict(), "weight": torch.cat([torch.eye(DIM), torch.zeros(1, DIM)])})
    eye = torch.eye(DIM, dtype=dtype)
    x = torch.cat([2 * eye, -5 * eye, 0 * eye, eye[:1]])
    labels = torch.cat([torch.arange(DIM).repeat(3), torch.tensor([6])])  # the last is labelled with the zero class
    found = ours(head, x, labels)
    assert all(value.isfinite().all() for value in found.values())
    if kind == "curricularface":
        head.t.fill_(0.2)
    assert_equal_within(found, plain(head, x, labels), 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("scale", [0.5, 128.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("blocks")
def test_large_scales_neither_overflow_nor_vanish(kind, scale):
    head = make(kind, scale=scale)
    x, labels = batch(head)
    assert_equal_within(ours(head, x, labels), plain(make(kind, scale=scale), x, labels), 1e-12)
    head = make(kind, scale=scale, dtype=torch.float32)
    assert all(value.isfinite().all() for value in ours(head, x.float(), labels).values())


@pytest.mark.parametrize("kind", KINDS)
def test_small_losses_keep_their_digits(kind):
    """What F.cross_entropy rounds to 0: 8 wrong classes at a cosine of -1 to the true one."""
    head = make(kind, classes=9, scale=20.0, dtype=torch.float32)
    rows = -torch.eye(DIM)[torch.zeros(9, dtype=torch.long)]
    rows[4] *= -1
    head.load_state_dict({**head.state_dict(), "weight": rows})
    loss, ranks = head.loss(torch.eye(DIM)[:1], torch.tensor([4]))
    target = 1.0 if kind == "cosine" else math.cos(0.3)
    assert ranks.item() == 0
    assert loss.item() == pytest.approx(8 * math.exp(20 * (-1 - target)), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_class(kind):
    found = ours(make(kind, classes=1), torch.ones(3, DIM, dtype=torch.float64), torch.zeros(3, dtype=torch.long))
    assert found["loss"] == 0 and found["ranks"].tolist() == [0, 0, 0]
    assert (found["x"] == 0).all() and (found["weight"] == 0).all()


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_whatever_autocast_says(kind, dtype):
    x, labels = batch(make(kind, dtype=torch.float32))
    want = ours(make(kind, dtype=torch.float32), x, labels)
    with torch.autocast("cpu", dtype=dtype):  # backward too, though nobody should
        found = ours(make(kind, dtype=torch.float32), x, labels)
    assert all(torch.equal(found[name], want[name]) for name in want)
    half = x.to(dtype).requires_grad_()
    loss, _ = make(kind, dtype=torch.float32).loss(half, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, make(kind, dtype=torch.float32).loss(half.float(), labels)[0])
    loss.backward()
    assert half.grad.dtype == dtype


def test_within_a_compiled_network():
    """The compiler leaves the loss alone and compiles what is around it."""
    head = make("curricularface")
    x, labels = batch(head)
    want = make("curricularface").loss(2 * x, labels)[0]

    def network(x: Tensor, labels: Tensor) -> Tensor:
        return head.loss(2 * x, labels)[0] + 1

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(network, backend=backend)
    assert torch.equal(compiled(x, labels), want + 1)
    assert len(graphs) == 2 and not any("mm(" in code for code in graphs)
    compiled(x, labels).backward()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_not_kept_a_second_time(kind):
    """What waits for the backward pass: the weight itself, and nothing else of its size."""
    head = make(kind, classes=4000, dtype=torch.float32)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != head.weight.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    x = torch.randn(2, DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head.loss(x, torch.tensor([5, 3999]))
    assert max(sizes) == 4000 * 2
