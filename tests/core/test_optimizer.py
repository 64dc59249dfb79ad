import pytest
import torch
from torch import nn

from core.builders import build_optimizer
from core.config import load_cfg
from core.optimizer import Frozen, build_adamw, build_sgd, parameter_groups, set_learning_rate
from model.backbones import BACKBONES
from model.resnet import ResNet

STAGES = BACKBONES["resnet"].stages
SETTINGS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}


def network() -> nn.Sequential:
    """A convolution, a batch norm, a convolution that is not trained, and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3))
    return layers.requires_grad_(True).double()


def sgd(model: nn.Module, *, bn_weight_decay: float | None = None, **settings) -> torch.optim.SGD:
    return build_sgd(parameter_groups(model, bn_weight_decay=bn_weight_decay), **settings)


def test_one_group_decays_every_parameter():
    model = network()
    (group,) = sgd(model, **SETTINGS).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    expected = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}
    assert {key: group[key] for key in expected} == expected


def test_batch_norm_may_have_a_decay_of_its_own():
    model = network()
    of_bn, others = sgd(model, bn_weight_decay=0.5, **SETTINGS).param_groups
    assert {id(p) for p in of_bn["params"]} == {id(model[1].weight), id(model[1].bias)}
    assert (of_bn["weight_decay"], others["weight_decay"]) == (0.5, 0.01)
    both = [id(p) for group in (of_bn, others) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters())
    assert of_bn["lr"] == others["lr"] == 0.1


def test_a_decay_of_zero_for_batch_norm_is_a_decay_of_its_own():
    groups = sgd(network(), bn_weight_decay=0.0, **SETTINGS).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.01]


@pytest.mark.parametrize("bn_weight_decay", [None, 0.0])
def test_what_is_not_trained_is_left_out(bn_weight_decay):
    model = network()
    model[2].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    groups = sgd(model, bn_weight_decay=bn_weight_decay, **SETTINGS).param_groups
    held = {id(model[2].weight), id(model[2].bias), id(model[1].bias)}
    assert held.isdisjoint(id(p) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == 5


@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, True), (0.0, False), (0.3, False)])
def test_three_steps_against_the_formula_written_out(dampening, nesterov):
    model = network()
    settings = SETTINGS | {"dampening": dampening, "nesterov": nesterov}
    optimizer = sgd(model, bn_weight_decay=0.2, **settings)
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


def test_the_head_may_have_a_rate_of_its_own():
    model = network()
    groups = parameter_groups(model, bn_weight_decay=0.0, head=model[4], head_lr_mult=10.0)
    optimizer = build_sgd(groups, **SETTINGS)
    set_learning_rate(optimizer, 0.3)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, 0.3, 0.0),
        (2, 3.0, 0.01),
        (4, 0.3, 0.01),
    ]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model[4].parameters()}


def test_two_adamw_steps_against_the_formula_written_out():
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2."""
    model = network()
    optimizer = build_adamw(parameter_groups(model), lr=0.1, betas=[0.8, 0.9], weight_decay=0.05)
    expected = [p.detach().clone() for p in model.parameters()]
    first, second = [[torch.zeros_like(p) for p in expected] for _ in range(2)]
    for step in (1, 2):
        torch.manual_seed(step)
        loss = model(torch.randn(4, 3, 1, 1, dtype=torch.float64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        for i, p in enumerate(model.parameters()):
            first[i] = 0.8 * first[i] + 0.2 * p.grad
            second[i] = 0.9 * second[i] + 0.1 * p.grad.square()
            move = first[i] / (1 - 0.8**step) / ((second[i] / (1 - 0.9**step)).sqrt() + 1e-8)
            expected[i] = expected[i] - 0.1 * 0.05 * expected[i] - 0.1 * move
        optimizer.step()
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "decays"),
    [("", [5e-4]), ("BN.USE_CUSTOM_WEIGHT_DECAY True BN.CUSTOM_WEIGHT_DECAY 0.25", [0.25, 5e-4])],
)
def test_the_configuration_reaches_the_optimizer(overrides, decays):
    settings = "OPTIM.BASE_LR 0.02 OPTIM.MOMENTUM 0.5 OPTIM.NESTEROV False OPTIM.DAMPENING 0.1"
    model = network()
    model.desc_cls = model[4]
    groups = build_optimizer(load_cfg(None, f"{settings} {overrides}".split()), model).param_groups
    assert [group["weight_decay"] for group in groups] == decays
    for group in groups:
        assert (group["lr"], group["momentum"], group["dampening"], group["nesterov"]) == (0.02, 0.5, 0.1, False)


def test_the_configuration_reaches_adamw():
    model = network()
    model.desc_cls = model[4]
    settings = "OPTIM.OPTIMIZER adamw OPTIM.BETAS 0.7,0.8 OPTIM.BASE_LR 0.02 OPTIM.HEAD_LR_MULT 5"
    optimizer = build_optimizer(load_cfg(None, settings.split()), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["betas"], group.get("lr_mult")) for group in optimizer.param_groups] == [
        ((0.7, 0.8), 5.0),
        ((0.7, 0.8), None),
    ]


# ------------------------------------------------------------------------------------- what is held still


def backbone() -> ResNet:
    torch.manual_seed(0)
    return ResNet(18)


@pytest.mark.parametrize("stages", [0, 1, 3, 5])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_is_frozen_does_not_change_and_the_rest_does(stages, batch_norm):
    model = backbone()
    frozen = Frozen(model, stages=STAGES[:stages], batch_norm=batch_norm)
    model.train()
    frozen.keep_statistics()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    features = model(torch.randn(2, 3, 64, 64))
    if trained:
        sum(f.square().mean() for f in features).backward()
        torch.optim.SGD(trained, lr=0.1).step()
    still = {name for name, module in model.named_modules() if batch_norm and isinstance(module, nn.BatchNorm2d)}
    for key, value in model.state_dict().items():
        held = key.split(".")[0] in STAGES[:stages] or key.rpartition(".")[0] in still
        assert torch.equal(value, before[key]) == held, key
