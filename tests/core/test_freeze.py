import pytest
import torch
from torch import nn

from core.freeze import STAGES, Frozen
from model.resnet import ResNet


def backbone() -> ResNet:
    torch.manual_seed(0)
    return ResNet(18)


@pytest.mark.parametrize("stages", [0, 1, 3, 5])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_is_frozen_does_not_change_and_the_rest_does(stages, batch_norm):
    model = backbone()
    frozen = Frozen(model, stages=stages, batch_norm=batch_norm)
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


def test_the_stages_are_those_of_the_backbone_in_order():
    assert tuple(name for name, _ in backbone().named_children()) == STAGES
