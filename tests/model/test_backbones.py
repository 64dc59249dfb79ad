"""The table of backbones says of each what the network itself is."""

import inspect

import pytest
import torch

from model.backbones import BACKBONES

EVERY = [(name, depth) for name, backbone in BACKBONES.items() for depth in backbone.sizes]


@pytest.mark.parametrize("name, depth", EVERY)
def test_widths_stages_and_recognition(name, depth):
    backbone = BACKBONES[name]
    size = backbone.sizes[depth]
    with torch.device("meta"):
        network = backbone.layers()(depth)
        f3, f4 = network(torch.empty(1, 3, 64, 96))
    assert f3.shape == (1, size.f3, 4, 6) and f4.shape == (1, size.f4, 2, 3)
    assert tuple(network.widths[-2:]) == (size.f3, size.f4)
    assert tuple(name for name, _ in network.named_children()) == backbone.stages
    assert network.recognise(network.state_dict())["MODEL.DEPTH"] == depth


@pytest.mark.parametrize("name", BACKBONES)
def test_every_argument_has_a_setting(name):
    assert list(inspect.signature(BACKBONES[name].layers()).parameters) == list(BACKBONES[name].settings)
