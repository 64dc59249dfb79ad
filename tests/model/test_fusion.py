"""Orthogonal fusion against explicit loops, and what projection means."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.fusion import orthogonal_component, orthogonal_fusion


def loops(local: torch.Tensor, global_: torch.Tensor) -> torch.Tensor:
    """Per position fl - (g . fl) g / |g|^2, then the average, then [g, average]."""
    batch, channels, height, width = local.shape
    rows = []
    for b in range(batch):
        g = global_[b].tolist()
        square = sum(v * v for v in g)
        total = [0.0] * channels
        for y in range(height):
            for x in range(width):
                fl = local[b, :, y, x].tolist()
                dot = sum(p * q for p, q in zip(g, fl, strict=True))
                for c in range(channels):
                    total[c] += fl[c] - dot * g[c] / square
        rows.append(g + [v / (height * width) for v in total])
    return torch.tensor(rows, dtype=torch.float64)


def example(seed: int = 0, shape=(2, 5, 3, 4), dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    local = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return local.to(dtype), torch.randn(*shape[:2], generator=generator, dtype=torch.float64).to(dtype)


def test_equals_loops():
    local, global_ = example()
    torch.testing.assert_close(orthogonal_fusion(local, global_), loops(local, global_), rtol=1e-12, atol=1e-13)


def test_known_values():
    local = torch.tensor([[[[3.0, 1.0]], [[4.0, 2.0]]]])  # positions (3, 4) and (1, 2)
    global_ = torch.tensor([[2.0, 0.0]])
    assert orthogonal_component(local, global_).flatten(1).tolist() == [[0.0, 0.0, 4.0, 2.0]]
    assert orthogonal_fusion(local, global_).tolist() == [[2.0, 0.0, 0.0, 3.0]]


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 4), st.integers(1, 4)),
    decade=st.integers(-8, 8),
)
def test_orthogonal_whatever_the_lengths(seed, shape, decade):
    local, global_ = example(seed, shape)
    global_ = global_ * 10.0**decade
    component = orthogonal_component(local, global_)
    assert component.shape == local.shape
    direction = (global_ / global_.norm(dim=1, keepdim=True))[:, :, None, None]
    along = (direction * local).sum(1, keepdim=True)
    # At every position: nothing along g is left, and what was taken away is what lay along g.
    assert (component * direction).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(local - component, along * direction, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(orthogonal_component(component, global_), component, rtol=0, atol=1e-11)
    # The length of g does not matter, its direction does.
    torch.testing.assert_close(orthogonal_component(local, -7.0 * global_), component, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 10_000), height=st.integers(1, 6), width=st.integers(1, 6))
def test_pooling_before_equals_pooling_after(seed, height, width):
    local, global_ = example(seed, (2, 6, height, width))
    after = orthogonal_component(local, global_).mean((2, 3))
    torch.testing.assert_close(orthogonal_fusion(local, global_)[:, 6:], after, rtol=1e-10, atol=1e-13)


def test_parallel_local_vectors_vanish():
    global_ = example()[1]
    local = global_[:, :, None, None] * torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    assert orthogonal_component(local, global_).abs().max() < 1e-14


def test_gradients():
    local, global_ = example(shape=(2, 4, 2, 3))
    assert torch.autograd.gradcheck(orthogonal_fusion, (local.requires_grad_(), global_.requires_grad_()), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_global_vector(dtype):
    local, global_ = example(dtype=dtype)
    global_[1] = 0
    local.requires_grad_()
    global_.requires_grad_()
    fused = orthogonal_fusion(local, global_)
    torch.testing.assert_close(fused[1], torch.cat([torch.zeros(5, dtype=dtype), local[1].mean((1, 2))]))
    fused.square().sum().backward()
    assert local.grad.isfinite().all() and global_.grad.isfinite().all()
    torch.testing.assert_close(fused[:1].detach().double(), loops(local[:1].double(), global_[:1].double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_fused_in_float32(dtype, autocast):
    local, global_ = example(shape=(2, 64, 9, 9), dtype=dtype)
    global_ = global_ * 100  # |g|^2 is 640,000: beyond float16
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        fused = orthogonal_fusion(local, global_)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), loops(local, global_), rtol=1e-5, atol=1e-6)


def test_float32_local_with_half_precision_global():
    local, global_ = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = orthogonal_fusion(local, global_.bfloat16())
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), loops(local, global_.bfloat16()), rtol=1e-5, atol=1e-6)


def test_float64_stays():
    assert orthogonal_fusion(*example()).dtype == torch.float64


def test_no_projection_left_after_the_mean():
    """The pooled half is orthogonal to the global half of the same image, not of another."""
    local, global_ = example(shape=(4, 16, 5, 5))
    g, pooled = orthogonal_fusion(local, global_).split(16, dim=1)
    assert torch.equal(g, global_)
    products = g @ pooled.T
    assert products.diagonal().abs().max() < 1e-12
    assert (products - products.diagonal().diag()).abs().max() > 0.1 / math.sqrt(16)
