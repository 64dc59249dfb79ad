import json
import math
from pathlib import Path

import pytest

from core.builders import learning_rate_at
from core.config import get_cfg
from core.schedule import learning_rate

# Computed by the published code (`impl` dolg) and by pycls.
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "lr.json").read_text())["cases"]
PUBLISHED = [case for case in GOLDENS if case["impl"] == "dolg"]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case["policy"])
def test_every_rate_of_the_published_code(case):
    settings = {key.lower(): value for key, value in case["optim"].items()}
    rates = [learning_rate(epoch, policy=case["policy"], **settings) for epoch in range(case["optim"]["MAX_EPOCH"])]
    assert rates == pytest.approx(case["lr"], rel=1e-12, abs=0)
    cfg = get_cfg()
    cfg.OPTIM.update(case["optim"], LR_POLICY=case["policy"])
    assert [learning_rate_at(cfg, epoch) for epoch in range(len(rates))] == rates


def test_the_goldens_hold_every_policy_with_and_without_warm_up():
    assert len(PUBLISHED) == 7 and {case["policy"] for case in PUBLISHED} == {"cos", "steps", "exp"}
    assert {case["optim"]["WARMUP_EPOCHS"] for case in PUBLISHED} == {0, 3, 5}


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1.0), (25, 0.8535533905932737), (50, 0.5), (75, 0.14644660940672624)])
def test_cos(epoch, rate):
    assert learning_rate(epoch, policy="cos", base_lr=1.0, max_epoch=100) == pytest.approx(rate, rel=1e-14)


def test_cos_ends_at_zero():
    assert learning_rate(100, policy="cos", base_lr=1.0, max_epoch=100) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 2.0), (2, 2.0), (3, 0.2), (4, 0.02), (99, 0.02)])
def test_steps_change_at_the_first_epoch_of_a_stage(epoch, rate):
    got = learning_rate(epoch, policy="steps", base_lr=2.0, max_epoch=100, steps=[0, 3, 4], lr_mult=0.1)
    assert got == pytest.approx(rate, rel=1e-14)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.5), (1, 0.475), (2, 0.45125)])
def test_exp(epoch, rate):
    got = learning_rate(epoch, policy="exp", base_lr=0.5, max_epoch=10, gamma=0.95)
    assert got == pytest.approx(rate, rel=1e-14)


def test_warm_up_is_linear_from_the_factor_to_one():
    settings = {"policy": "steps", "base_lr": 1.0, "max_epoch": 10, "warmup_epochs": 4, "warmup_factor": 0.2}
    rates = [learning_rate(epoch, **settings) for epoch in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rel=1e-14)


@pytest.mark.parametrize("policy", ["cos", "steps", "exp"])
def test_after_the_warm_up_nothing_of_it_is_left(policy):
    settings = {"policy": policy, "base_lr": 0.3, "max_epoch": 20, "steps": [0, 7], "gamma": 0.9}
    for epoch in range(5, 20):
        assert learning_rate(epoch, warmup_epochs=5, **settings) == learning_rate(epoch, **settings)


def test_the_rate_is_a_pure_function_of_progress():
    halfway = learning_rate(2.5, policy="cos", base_lr=1.0, max_epoch=5)
    assert halfway == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)), rel=1e-14)


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="unknown learning-rate policy lin: use cos, steps or exp"):
        learning_rate(0, policy="lin", base_lr=1.0, max_epoch=1)
