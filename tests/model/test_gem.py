"""Generalised-mean pooling against an explicit loop, its limits, its gradients and its number formats."""

import math
from itertools import pairwise

import pytest
import torch

from model.gem import GeM


def loop(maps: torch.Tensor, p: float, eps: float = 1e-6) -> torch.Tensor:
    batch, channels, height, width = maps.shape
    out = torch.zeros(batch, channels, dtype=torch.float64)
    for b in range(batch):
        for c in range(channels):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    total += max(maps[b, c, y, x].item(), eps) ** p
            out[b, c] = (total / (height * width)) ** (1 / p)
    return out


def maps_like_f4(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """About half zeros, like what a ReLU leaves, and one channel that is empty."""
    maps = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu() * 5
    maps[0, 0] = 0
    return maps.to(dtype)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.875, 3.0, 7.0])
def test_equals_loop(p):
    maps = maps_like_f4(2, 4, 3, 5)
    torch.testing.assert_close(GeM(p).double()(maps), loop(maps, p), rtol=1e-12, atol=0)


def test_eps_is_a_floor():
    maps = torch.tensor([-3.0, 0.0, 2.0, 0.25], dtype=torch.float64).view(1, 1, 2, 2)
    torch.testing.assert_close(GeM(2.0, eps=0.5).double()(maps).item(), math.sqrt((0.25 + 0.25 + 4 + 0.25) / 4))
    empty = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(GeM().double()(empty).item(), 1e-6)


def test_limits():
    maps = maps_like_f4(2, 4, 3, 5, dtype=torch.float32)
    torch.testing.assert_close(GeM(1.0)(maps), maps.clamp(min=1e-6).mean((2, 3)))
    # (1 / 15)^(1 / 1000) is 0.9973; neither 5^1000 nor 1e-6^1000 is a float32.
    torch.testing.assert_close(GeM(1000.0)(maps), maps.clamp(min=1e-6).amax((2, 3)), rtol=3e-3, atol=0)


def test_grows_with_p_between_mean_and_maximum():
    maps = maps_like_f4(2, 4, 3, 5)[:, 1:]
    pooled = [GeM(p).double()(maps) for p in (1.0, 2.0, 3.0, 8.0, 50.0)]
    for smaller, larger in pairwise(pooled):
        assert (smaller < larger).all()
    assert (pooled[-1] < maps.amax((2, 3))).all()


@pytest.mark.parametrize("p", [1.0, 2.875])
def test_gradients(p):
    pool = GeM(p).double()
    maps = maps_like_f4(2, 3, 3, 4).add(0.1).requires_grad_()
    exponent = torch.tensor([p], dtype=torch.float64, requires_grad=True)

    def pooled(maps, exponent):
        return torch.func.functional_call(pool, {"p": exponent}, (maps,))

    assert torch.autograd.gradcheck(pooled, (maps, exponent), rtol=1e-6)


def test_no_gradient_below_the_floor():
    maps = torch.tensor([-1.0, 0.0, 3.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    GeM()(maps).sum().backward()
    assert maps.grad.flatten()[:2].tolist() == [0.0, 0.0]
    assert (maps.grad.flatten()[2:] > 0).all()


@pytest.mark.parametrize("p", [3.0, 8.0, 40.0])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_finite_for_empty_channels_and_wide_ranges(p, factor):
    pool = GeM(p)
    maps = (maps_like_f4(2, 4, 7, 7, dtype=torch.float32) * factor).requires_grad_()
    pooled = pool(maps)
    pooled.sum().backward()
    assert pooled.isfinite().all() and maps.grad.isfinite().all() and pool.p.grad.isfinite().all()
    torch.testing.assert_close(pooled, GeM(p).double()(maps.detach().double()).float(), rtol=1e-5, atol=0)


def test_trainable_and_fixed_power():
    trained, fixed = GeM(3.0), GeM(3.0, trainable=False)
    for pool in (trained, fixed):
        assert torch.equal(pool.state_dict()["p"], torch.tensor([3.0]))
        pool(maps_like_f4(1, 2, 3, 3, dtype=torch.float32).requires_grad_()).sum().backward()
    assert trained.p.grad is not None and trained.p.grad.item() != 0
    assert fixed.p.grad is None and not fixed.p.requires_grad
    fixed.load_state_dict({"p": torch.tensor([2.5])})
    assert fixed.p.item() == 2.5 and not fixed.p.requires_grad


def test_whole_number_power():
    for trainable in (True, False):
        pool = GeM(3, trainable=trainable)
        assert pool.p.dtype == torch.float32
        assert torch.equal(pool(torch.ones(1, 1, 2, 2)), torch.ones(1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_input_is_pooled_in_float32(dtype, autocast):
    maps = (maps_like_f4(2, 4, 7, 7) * 2000).to(dtype)  # squares and cubes are far beyond float16
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        pooled = GeM(2.875)(maps)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, GeM(2.875).double()(maps.double()).float(), rtol=1e-6, atol=0)


def test_float32_under_autocast_is_untouched():
    maps = maps_like_f4(2, 4, 7, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = GeM()(maps)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, GeM()(maps))


def test_float64_stays():
    maps = maps_like_f4(1, 2, 3, 3)
    assert GeM()(maps).dtype == torch.float64
    assert GeM().double()(maps).dtype == torch.float64
