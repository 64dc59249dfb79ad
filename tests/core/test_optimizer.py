import pytest
import torch
from torch import nn

from core.builders import build_optimizer
from core.config import load_cfg
from core.optimizer import build_sgd, set_learning_rate

SETTINGS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}


def network() -> nn.Sequential:
    """A convolution, a batch norm, a convolution that is not trained, and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3))
    return layers.requires_grad_(True).double()


def test_one_group_decays_every_parameter():
    model = network()
    (group,) = build_sgd(model, **SETTINGS).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    expected = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}
    assert {key: group[key] for key in expected} == expected


def test_batch_norm_may_have_a_decay_of_its_own():
    model = network()
    of_bn, others = build_sgd(model, bn_weight_decay=0.5, **SETTINGS).param_groups
    assert {id(p) for p in of_bn["params"]} == {id(model[1].weight), id(model[1].bias)}
    assert (of_bn["weight_decay"], others["weight_decay"]) == (0.5, 0.01)
    both = [id(p) for group in (of_bn, others) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters())
    assert of_bn["lr"] == others["lr"] == 0.1


def test_a_decay_of_zero_for_batch_norm_is_a_decay_of_its_own():
    groups = build_sgd(network(), bn_weight_decay=0.0, **SETTINGS).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.01]


@pytest.mark.parametrize("bn_weight_decay", [None, 0.0])
def test_what_is_not_trained_is_left_out(bn_weight_decay):
    model = network()
    model[2].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    groups = build_sgd(model, bn_weight_decay=bn_weight_decay, **SETTINGS).param_groups
    held = {id(model[2].weight), id(model[2].bias), id(model[1].bias)}
    assert held.isdisjoint(id(p) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == 5


@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, True), (0.0, False), (0.3, False)])
def test_three_steps_against_the_formula_written_out(dampening, nesterov):
    model = network()
    settings = SETTINGS | {"dampening": dampening, "nesterov": nesterov}
    optimizer = build_sgd(model, bn_weight_decay=0.2, **settings)
    decay = {id(p): 0.2 if id(p) in {id(q) for q in model[1].parameters()} else 0.01 for p in model.parameters()}
    expected = [p.detach().clone() for p in model.parameters()]
    momentum = [None] * len(expected)
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        set_learning_rate(optimizer, rate)
        torch.manual_seed(step)
        loss = model(torch.randn(4, 3, 1, 1, dtype=torch.float64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        for i, p in enumerate(model.parameters()):
            g = p.grad + decay[id(p)] * expected[i]
            momentum[i] = g.clone() if momentum[i] is None else 0.9 * momentum[i] + (1 - dampening) * g
            expected[i] = expected[i] - rate * (g + 0.9 * momentum[i] if nesterov else momentum[i])
        optimizer.step()
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("overrides", "decays"),
    [("", [5e-4]), ("BN.USE_CUSTOM_WEIGHT_DECAY True BN.CUSTOM_WEIGHT_DECAY 0.25", [0.25, 5e-4])],
)
def test_the_configuration_reaches_the_optimizer(overrides, decays):
    settings = "OPTIM.BASE_LR 0.02 OPTIM.MOMENTUM 0.5 OPTIM.NESTEROV False OPTIM.DAMPENING 0.1"
    groups = build_optimizer(load_cfg(None, f"{settings} {overrides}".split()), network()).param_groups
    assert [group["weight_decay"] for group in groups] == decays
    for group in groups:
        assert (group["lr"], group["momentum"], group["dampening"], group["nesterov"]) == (0.02, 0.5, 0.1, False)
