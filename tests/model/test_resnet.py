"""The backbone against a functional version of itself, published names, known sizes and its initial distribution."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import resnet
from model.resnet import ResNet, init_convolutions

NAMES = Path(__file__).parents[1] / "goldens" / "model" / "names_R50_MA.txt"
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
RESNEXT = {"groups": 32, "width_per_group": 4}
# Parameters of the ImageNet models less their 1000-class layer (torchvision; timm for the 32x4d ResNeXt-101).
PARAMETERS = [
    (18, {}, 11_689_512 - 513_000),
    (34, {}, 21_797_672 - 513_000),
    (50, {}, 25_557_032 - 2_049_000),
    (101, {}, 44_549_160 - 2_049_000),
    (152, {}, 60_192_808 - 2_049_000),
    (50, RESNEXT, 25_028_904 - 2_049_000),
    (101, RESNEXT, 44_177_704 - 2_049_000),
]


@pytest.fixture
def thin(monkeypatch):
    """Fewer channels: quick, and the code is the same."""
    monkeypatch.setattr(resnet, "STEM_WIDTH", 8)
    monkeypatch.setattr(resnet, "BASIC_WIDTHS", (8, 16, 24, 32))
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (24, 32, 40, 48))


def shaken(depth: int, **settings) -> ResNet:
    """A float64 network whose BN layers all do something."""
    torch.manual_seed(depth)
    network = ResNet(depth, **settings).double()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -0.5, 1.0)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network


def functional_resnet(state: dict, x: torch.Tensor, depth: int, *, groups: int = 1, stride_1x1: bool = False) -> tuple:
    """f3 and f4 from the weights alone, running statistics in every BN, written down from the papers."""

    def norm(x, name):
        mean, var, gamma, beta = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * gamma.view(shape) + beta.view(shape)

    def conv(x, name, stride, **kwargs):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, **kwargs)

    x = norm(conv(x, "stem.conv", 2), "stem.bn").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for stage in (1, 2, 3, 4):
        for block in range(1, BLOCKS[depth][stage - 1] + 1):
            name = f"s{stage}.b{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            shortcut = norm(conv(x, f"{name}.proj", stride), f"{name}.bn") if f"{name}.proj.weight" in state else x
            if depth < 50:
                x = norm(conv(x, f"{name}.f.a", stride), f"{name}.f.a_bn").relu()
                x = norm(conv(x, f"{name}.f.b", 1), f"{name}.f.b_bn")
            else:
                x = norm(conv(x, f"{name}.f.a", stride if stride_1x1 else 1), f"{name}.f.a_bn").relu()
                x = norm(conv(x, f"{name}.f.b", 1 if stride_1x1 else stride, groups=groups), f"{name}.f.b_bn").relu()
                x = norm(conv(x, f"{name}.f.c", 1), f"{name}.f.c_bn")
            x = (x + shortcut).relu()
        maps.append(x)
    return maps[2], maps[3]


@pytest.mark.parametrize(
    ("depth", "settings"),
    [
        (18, {}),
        (34, {}),
        (50, {"width_per_group": 8}),
        (101, {"width_per_group": 4}),
        (50, {"width_per_group": 8, "stride_1x1": True}),
        (50, {"width_per_group": 2, "groups": 4}),
        (50, {"width_per_group": 8, "relu_inplace": False}),
    ],
)
def test_forward_equals_functional_version(thin, depth, settings):
    network = shaken(depth, **settings).eval()
    images = torch.randn(2, 3, 75, 100, dtype=torch.float64)
    literal = {key: value for key, value in settings.items() if key in ("groups", "stride_1x1")}
    with torch.no_grad():
        got = network(images)
        want = functional_resnet(network.state_dict(), images, depth, **literal)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("depth", "settings", "parameters"), PARAMETERS)
def test_sizes(depth, settings, parameters):
    with torch.device("meta"):
        network = ResNet(depth, **settings)
        c3, c4 = (256, 512) if depth < 50 else (1024, 2048)
        assert network.widths[2:] == (c3, c4)
        assert sum(p.numel() for p in network.parameters()) == parameters
        # Every halving rounds up.
        f3, f4 = network(torch.empty(2, 3, 97, 160))
        assert f3.shape == (2, c3, math.ceil(97 / 16), 160 / 16)
        assert f4.shape == (2, c4, math.ceil(97 / 32), 160 / 32)


def test_published_names_and_shapes():
    with torch.device("meta"):
        network = ResNet(50)
    own = [f"globalmodel.{key} {'x'.join(map(str, v.shape)) or 'scalar'}" for key, v in network.state_dict().items()]
    assert own == [line for line in NAMES.read_text().splitlines() if line.startswith("globalmodel.")]


def test_names_of_basic_blocks_and_of_projections():
    with torch.device("meta"):
        basic, bottleneck = ResNet(18), ResNet(50)
    convolutions = [
        key for key in basic.state_dict() if key.startswith("s2.") and key.endswith(("a.weight", "b.weight"))
    ]
    assert convolutions == [f"s2.b{block}.f.{layer}.weight" for block in (1, 2) for layer in "ab"]
    # The first stage widens 64 to 256 in a bottleneck network only.
    assert [key[:5] for key in basic.state_dict() if "proj" in key] == ["s2.b1", "s3.b1", "s4.b1"]
    assert [key[:5] for key in bottleneck.state_dict() if "proj" in key] == ["s1.b1", "s2.b1", "s3.b1", "s4.b1"]


def test_grouped_convolutions_of_resnext():
    with torch.device("meta"):
        network = ResNet(50, **RESNEXT)
    for stage, inner in zip((1, 2, 3, 4), (128, 256, 512, 1024), strict=True):
        layer = network.get_submodule(f"s{stage}.b2.f.b")
        assert (layer.groups, layer.in_channels, layer.out_channels) == (32, inner, inner)
        assert layer.weight.shape == (inner, inner // 32, 3, 3)


@pytest.mark.parametrize("stride_1x1", [False, True])
def test_place_of_the_stride(stride_1x1):
    with torch.device("meta"):
        network = ResNet(50, stride_1x1=stride_1x1)
    strided = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    layer = "a" if stride_1x1 else "b"
    assert strided == {"stem.conv"} | {f"s{s}.b1.{part}" for s in (2, 3, 4) for part in ("proj", f"f.{layer}")}


def test_batch_norm_settings_reach_every_layer():
    with torch.device("meta"):
        network = ResNet(50, bn_eps=1e-3, bn_momentum=0.25)
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == 1 + 3 * 16 + 4
    assert {(layer.eps, layer.momentum) for layer in layers} == {(1e-3, 0.25)}


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_in_place_where_asked_for(inplace):
    with torch.device("meta"):
        network = ResNet(18, relu_inplace=inplace)
    assert {m.inplace for m in network.modules() if isinstance(m, nn.ReLU)} == {inplace}


@pytest.mark.parametrize("depth", [18, 50])
def test_relu_in_place_changes_neither_maps_nor_gradients(thin, depth):
    results = []
    for inplace in (False, True):
        network = shaken(depth, width_per_group=64 if depth < 50 else 4, relu_inplace=inplace).train()
        f3, f4 = network(torch.linspace(-1, 1, 2 * 3 * 48 * 48, dtype=torch.float64).view(2, 3, 48, 48).sin())
        (f3.square().mean() + f4.mean()).backward()
        results.append([f3, f4, *(p.grad for p in network.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_every_parameter(thin):
    network = shaken(50, width_per_group=8).train()
    f3, f4 = network(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    (f3.square().sum() + f4.square().sum()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_initial_convolutions_are_normal_by_fan_out():
    torch.manual_seed(0)
    network = ResNet(18)
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        out, _, k, _ = layer.weight.shape
        want, n = math.sqrt(2 / (k * k * out)), layer.weight.numel()
        values = layer.weight.detach()
        assert abs(values.std() / want - 1) < 5 / math.sqrt(2 * n), name
        assert abs(values.mean()) < 5 * want / math.sqrt(n), name
        # 4.6% of a normal distribution lie beyond two standard deviations, none of a uniform one.
        assert abs((values.abs() > 2 * want).float().mean() - 0.0455) < 0.02, name
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_grouped_convolutions_start_by_fan_out_over_all_groups():
    torch.manual_seed(0)
    layer = nn.Conv2d(256, 512, 3, groups=32)
    bias = layer.bias.detach().clone()
    init_convolutions(layer)
    assert abs(layer.weight.std() / math.sqrt(2 / (9 * 512)) - 1) < 0.02
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize(("depth", "final"), [(18, "b_bn"), (50, "c_bn")])
@pytest.mark.parametrize("zero", [False, True])
def test_initial_batch_norm(depth, final, zero):
    network = ResNet(depth, zero_init_final_gamma=zero)
    seen = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            seen += (gamma := 0.0 if zero and name.endswith(f".f.{final}") else 1.0) == 0.0
            assert torch.equal(layer.weight, torch.full_like(layer.weight, gamma)), name
            assert not layer.bias.any()
    assert seen == (sum(BLOCKS[depth]) if zero else 0)
    if zero:  # a block without projection is then the identity of what a ReLU left
        x = torch.rand(1, network.widths[0], 5, 6)
        assert torch.equal(network.s1.b2(x), x)
