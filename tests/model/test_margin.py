"""The heads against formulas in angles and element by element; precision, edges, and t over several processes."""

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.margin import ArcFaceHead, CosineHead, CurricularFaceHead, build_head

ROOT = Path(__file__).parents[2]
SCALE, MARGIN = 30.0, 0.15
KINDS = ["cosine", "arcface", "curricularface"]


def make(kind: str, dim: int = 6, classes: int = 5, *, seed: int = 0, margin: float = MARGIN) -> CosineHead:
    torch.manual_seed(seed)
    return build_head(kind, dim, classes, scale=SCALE, margin=margin).double()


def batch(size: int = 8, dim: int = 6, classes: int = 5, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))


def angular_logits(head: CosineHead, x: torch.Tensor, labels: torch.Tensor, *, m: float) -> torch.Tensor:
    """ArcFace by angles: theta from arccos, cos(theta_y + m), and the fallback where theta_y + m is not below pi."""
    out = torch.zeros(len(x), len(head.weight), dtype=torch.float64)
    for i, y in enumerate(labels.tolist()):
        for j in range(len(head.weight)):
            theta = math.acos(max(-1.0, min(1.0, cosine(x[i].tolist(), head.weight[j].tolist()))))
            value = math.cos(theta)
            if j == y:
                value = math.cos(theta + m) if theta + m < math.pi else math.cos(theta) - m * math.sin(m)
            out[i, j] = SCALE * value
    return out


def curricular_logits(head: CurricularFaceHead, x: torch.Tensor, labels: torch.Tensor, *, t: float, m: float):
    """CurricularFace element by element, and the t it used: renewed from this batch first."""
    cosines = [[cosine(row, w) for w in head.weight.tolist()] for row in x.tolist()]
    targets = [row[y] for row, y in zip(cosines, labels.tolist(), strict=True)]
    t = 0.01 * sum(targets) / len(targets) + 0.99 * t
    out = torch.zeros(len(x), len(head.weight), dtype=torch.float64)
    for i, y in enumerate(labels.tolist()):
        c_y = targets[i]
        with_margin = c_y * math.cos(m) - math.sqrt(max(0.0, 1 - c_y * c_y)) * math.sin(m)
        for j, c in enumerate(cosines[i]):
            if j == y:
                value = with_margin if c_y > math.cos(math.pi - m) else c_y - m * math.sin(math.pi - m)
            else:  # the comparison is with cos(theta_y + m), also where theta_y + m is past pi
                value = c * (t + c) if c > with_margin else c
            out[i, j] = SCALE * value
    return out, t


def with_extremes(head: CosineHead) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that holds targets near their class, opposite to it (past pi), and hard negatives."""
    x, labels = batch()
    weight = head.weight.detach()
    x[0] = 2 * weight[labels[0]] + 1e-3 * x[0]
    x[1] = -3 * weight[labels[1]] + 1e-3 * x[1]
    x[2] = -weight[labels[2]] + 0.3 * weight[labels[2] - 1]
    x[3] = weight[labels[3] - 1] + 1e-3 * x[3]
    return x, labels


# ------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_plain_cosines_without_labels(kind, training):
    head = make(kind).train(training)
    x, labels = batch()
    want = torch.tensor([[SCALE * cosine(row, w) for w in head.weight.tolist()] for row in x.tolist()])
    torch.testing.assert_close(head(x), want.double(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(head(x), angular_logits(head, x, labels, m=0.0), rtol=1e-9, atol=1e-9)
    if kind == "curricularface":
        assert head.t.item() == 0.0


def test_cosine_head_has_no_margin():
    head = make("cosine")
    x, labels = batch()
    assert torch.equal(head(x, labels), head(x))


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.5, 1.2])
def test_arcface_equals_angles(margin):
    head = make("arcface", margin=margin)
    x, labels = with_extremes(head)
    want = angular_logits(head, x, labels, m=margin)
    torch.testing.assert_close(head(x, labels), want, rtol=1e-8, atol=1e-7)
    theta = (head(x).gather(1, labels[:, None]) / SCALE).acos()
    assert margin == 0 or ((theta + margin > math.pi).any() and (theta + margin < math.pi).any())


def test_arcface_known_values():
    head = make("arcface", dim=2, classes=3, margin=math.pi / 6)
    head.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0]])})
    degrees = torch.tensor([30.0, 60.0, 170.0], dtype=torch.float64).deg2rad()
    logits = head(torch.stack([degrees.cos(), degrees.sin()], 1), torch.tensor([0, 0, 0])) / SCALE
    want = [math.cos(math.pi / 3), 0.0, math.cos(math.radians(170)) - math.pi / 6 * 0.5]
    torch.testing.assert_close(logits[:, 0], torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(logits[:, 1:], torch.stack([degrees.sin(), -degrees.cos()], 1))


def test_the_margin_lowers_every_target_and_its_logit_falls_with_the_angle():
    head = make("arcface", dim=2, classes=2)
    head.load_state_dict({"weight": torch.eye(2)})
    theta = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    x, labels = torch.stack([theta.cos(), theta.sin()], 1), torch.zeros(400, dtype=torch.long)
    targets = head(x, labels)[:, 0]
    assert (targets < head(x)[:, 0]).all()
    assert (targets.diff() < 0).all()


@pytest.mark.parametrize("margin", [0.15, 0.5])
def test_curricularface_equals_literal_version_over_steps(margin):
    head = make("curricularface", margin=margin).train()
    t = 0.0
    for step in range(3):
        x, labels = with_extremes(head) if step == 0 else batch(seed=step)
        want, t = curricular_logits(head, x, labels, t=t, m=margin)
        torch.testing.assert_close(head(x, labels), want, rtol=1e-8, atol=1e-7)
        torch.testing.assert_close(head.t.item(), t, rtol=1e-12, atol=0)
        plain = curricular_logits(head, x, labels, t=99.0, m=margin)[0]
        assert not torch.allclose(want, plain)  # there were hard negatives, or the step would show nothing


def test_hard_negatives_past_pi():
    """Past pi the mask still compares with cos(theta_y + m), not with the lower value the target has there."""
    head = make("curricularface", dim=2, classes=2).eval()
    near = math.radians(2.0)
    head.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [math.cos(near), math.sin(near)]]), "t": torch.ones(1)})
    x = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    target, other = (head(x, torch.tensor([0])) / SCALE)[0].tolist()
    assert target == pytest.approx(-1 - MARGIN * math.sin(MARGIN), abs=1e-6)
    assert other == pytest.approx(-math.cos(near), abs=1e-6)
    assert target < other < math.cos(math.pi + MARGIN)


def test_t_is_renewed_before_use():
    head = make("curricularface", dim=2, classes=2).train()
    head.load_state_dict({"weight": torch.eye(2), "t": torch.tensor([0.5])})
    # Target cosine 0.6; the other, 0.8, is above cos(theta_y + m) and becomes 0.8 (t + 0.8), t = 0.006 + 0.495.
    logits = head(torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.tensor([0]))
    assert logits[0, 1].item() == pytest.approx(SCALE * 0.8 * (0.501 + 0.8), abs=1e-10)
    assert head.t.item() == pytest.approx(0.501, abs=1e-12)


def test_t_stands_still_in_eval_mode_and_is_used_there():
    head = make("curricularface", dim=2, classes=2).eval()
    head.load_state_dict({"weight": torch.eye(2), "t": torch.tensor([0.5])})
    logits = head(torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.tensor([0]))
    assert logits[0, 1].item() == pytest.approx(SCALE * 0.8 * 1.3, abs=1e-10)
    assert head.t.item() == 0.5


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_away_from_kinks(kind):
    head = make(kind).eval()  # t stands still between the evaluations
    if kind == "curricularface":
        head.t.fill_(0.25)
    x, labels = batch()
    rest = {name: value.clone() for name, value in head.named_buffers()}

    def loss(x, weight):
        return F.cross_entropy(torch.func.functional_call(head, {"weight": weight, **rest}, (x, labels)), labels)

    weight = head.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), weight), eps=1e-7, atol=1e-6, rtol=1e-5)


def test_gradient_flows_through_the_factor_but_not_into_t():
    head = make("curricularface", dim=2, classes=2).train()
    head.load_state_dict({"weight": torch.eye(2), "t": torch.tensor([0.5])})
    x = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    head(x, torch.tensor([0]))[0, 1].backward()
    # d/dc of s c (t + c) is s (t + 2c); of the normalised x, dc/dx = (e_2 - c x).
    slope = SCALE * (0.501 + 1.6)
    torch.testing.assert_close(x.grad, slope * torch.tensor([[-0.8 * 0.6, 1 - 0.64]], dtype=torch.float64))
    assert not head.t.requires_grad


def test_several_forwards_before_one_backward():
    """Gradient accumulation: t changes in between, and what the first graph holds is not overwritten."""
    head = make("curricularface").train()
    (x1, y1), (x2, y2) = batch(seed=1), batch(seed=2)
    loss = F.cross_entropy(head(x1, y1), y1)
    (loss + F.cross_entropy(head(x2, y2), y2)).backward()
    together = head.weight.grad.clone()
    head.weight.grad = None
    head.t.zero_()
    for x, y in ((x1, y1), (x2, y2)):
        F.cross_entropy(head(x, y), y).backward()
    torch.testing.assert_close(head.weight.grad, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_at_cosines_of_exactly_one_and_for_zero_descriptors(kind, dtype):
    head = make(kind, dim=3, classes=3).to(dtype).train()
    head.load_state_dict({**head.state_dict(), "weight": torch.eye(3)})
    eye = torch.eye(3, dtype=dtype)
    x = torch.cat([eye * 2, -eye * 5, torch.zeros(3, 3, dtype=dtype), eye + 1e-8, -eye + 1e-4]).requires_grad_()
    labels = torch.arange(3).repeat(5)
    plain = head(x.detach()).gather(1, labels[:, None])[:, 0] / SCALE
    assert plain[:9].tolist() == [1.0] * 3 + [-1.0] * 3 + [0.0] * 3
    logits = head(x, labels)
    F.cross_entropy(logits, labels).backward()
    assert logits.isfinite().all() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()
    if kind != "cosine":
        target = logits.detach().gather(1, labels[:, None])[:, 0] / SCALE
        want = [math.cos(MARGIN)] * 3 + [-1 - MARGIN * math.sin(MARGIN)] * 3 + [-math.sin(MARGIN)] * 3
        torch.testing.assert_close(target[:9].double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_no_cosine_leaves_its_range_by_rounding():
    head = make("cosine", dim=64, classes=500).float()
    weight = head.weight.detach()
    for sign in (1, -1):
        assert ((head(sign * weight) / SCALE).abs() <= 1).all()
    assert (F.normalize(weight).square().sum(1) > 1).any()  # there was something to cut off


@pytest.mark.parametrize("kind", ["arcface", "curricularface"])
def test_zero_class_weight_is_finite(kind):
    head = make(kind).float().train()
    torch.nn.init.zeros_(head.weight)
    x, labels = batch()
    loss = F.cross_entropy(head(x.float(), labels), labels)
    loss.backward()
    assert loss.isfinite() and head.weight.grad.isfinite().all()


def test_training_separates_classes():
    """Not a dead head: a few steps of SGD on the head alone bring the loss down."""
    for kind in KINDS:
        head = make(kind, dim=8, classes=4).train()
        centres, labels = torch.randn(4, 8, dtype=torch.float64), torch.arange(4).repeat(8)
        x = centres[labels] + 0.1 * torch.randn(32, 8, dtype=torch.float64)
        losses = []
        for _ in range(40):
            loss = F.cross_entropy(head(x, labels), labels)
            (gradient,) = torch.autograd.grad(loss, head.weight)
            head.weight.data -= 0.05 * gradient
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0], kind


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, dtype):
    x, labels = batch()
    results = []
    for autocast in (False, True):
        head = make(kind).float().train()
        inputs = x.float().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            logits, plain = head(inputs, labels), head(inputs)
        logits.sum().backward()
        results.append((logits, plain, inputs.grad, head.weight.grad))
    for without, within in zip(*results, strict=True):
        assert within.dtype == torch.float32
        assert torch.equal(without, within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_descriptors_and_weights_are_taken_to_float32(kind, dtype):
    x, labels = batch()
    head = make(kind).to(dtype).eval()
    reference = make(kind).to(dtype).float().eval()
    for inputs in (x.to(dtype), x.float()):
        logits = head(inputs, labels)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, reference(inputs.float(), labels))
    float_head = make(kind).float().eval()
    assert torch.equal(float_head(x.to(dtype), labels), float_head(x.to(dtype).float(), labels))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays(kind):
    x, labels = batch()
    head = make(kind).train()
    assert head(x, labels).dtype == head(x).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x, labels).dtype == torch.float64
    assert make(kind).float()(x, labels).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("kind", KINDS)
def test_weight_starts_xavier_uniform(kind):
    torch.manual_seed(0)
    weight = build_head(kind, 128, 1000, scale=SCALE, margin=MARGIN).weight
    assert weight.shape == (1000, 128)
    bound = math.sqrt(6 / (1000 + 128))
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_published_names():
    for kind, names in (("cosine", ["weight"]), ("arcface", ["weight"]), ("curricularface", ["weight", "t"])):
        assert list(make(kind).state_dict()) == names
    assert make("curricularface").t.shape == (1,)


def test_build_head_by_kind():
    kinds = {"cosine": CosineHead, "arcface": ArcFaceHead, "curricularface": CurricularFaceHead}
    for kind, cls in kinds.items():
        head = build_head(kind, 3, 4, scale=12.0, margin=0.3)
        assert type(head) is cls and head.scale == 12.0
        assert kind == "cosine" or head.margin == 0.3


PROCESS = """
import sys
import torch
import torch.distributed as dist
from model.margin import build_head

rank, world, rendezvous, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
torch.manual_seed(0)
head = build_head("curricularface", 6, 5, scale=30.0, margin=0.15).double().train()
steps = []
for step in range(4):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    x[:4] = x[:4].abs() + step  # the shares differ, or a mean over one of them would do
    labels = torch.arange(8) % 5
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    logits = head(x[share], labels[share])
    head(x[share])  # validation in between leaves t alone
    steps.append((head.t.item(), logits.detach()))
torch.save(steps, out)
if world > 1:
    dist.destroy_process_group()
"""


def test_t_over_two_processes_is_that_of_the_global_batch(tmp_path, monkeypatch):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)

    def arguments(rank: int, world: int) -> list[str]:
        return [str(script), str(rank), str(world), str(tmp_path / "rendezvous"), str(tmp_path / f"{world}.{rank}")]

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, *arguments(rank, 2)], env=environment) for rank in (0, 1)]
    try:
        monkeypatch.setattr(sys, "argv", arguments(0, 1))
        runpy.run_path(str(script))
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    alone, first, second = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    assert len({t for t, _ in alone}) == 4
    for (t, logits), (t0, logits0), (t1, logits1) in zip(alone, first, second, strict=True):
        assert t0 == t1 == pytest.approx(t, rel=1e-12)
        torch.testing.assert_close(torch.cat([logits0, logits1]), logits, rtol=1e-12, atol=1e-12)
