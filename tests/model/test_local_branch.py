"""The multi-atrous module and the attention against versions that spell every step out."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from model.aspp import MultiAtrous
from model.attention import LocalBranch

NAMES = Path(__file__).parents[1] / "goldens" / "model" / "names_R50_MA.txt"


def shifted_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: int) -> torch.Tensor:
    """A 3x3 (or 1x1) convolution as a sum over shifted maps, zero outside the map."""
    batch, _, height, width = x.shape
    k = weight.shape[2]
    out = bias.view(1, -1, 1, 1).expand(batch, -1, height, width).clone()
    for i in range(k):
        for j in range(k):
            dy, dx = (i - k // 2) * dilation, (j - k // 2) * dilation
            moved = torch.zeros_like(x)
            ys, xs = slice(max(0, -dy), min(height, height - dy)), slice(max(0, -dx), min(width, width - dx))
            if ys.start < ys.stop and xs.start < xs.stop:
                moved[:, :, ys, xs] = x[:, :, ys.start + dy : ys.stop + dy, xs.start + dx : xs.stop + dx]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], moved)
    return out


def literal_multi_atrous(state: dict, x: torch.Tensor) -> torch.Tensor:
    def conv(x, name, dilation=1):
        return shifted_convolution(x, state[f"{name}.weight"], state[f"{name}.bias"], dilation)

    average = x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    image = conv(average, "im_pool.1").clamp(min=0) * torch.ones_like(x[:, :1])
    maps = [image, conv(x, "aspp.0"), conv(x, "aspp.1", 6), conv(x, "aspp.2", 12), conv(x, "aspp.3", 18)]
    return conv(torch.cat(maps, dim=1), "conv_after.0").clamp(min=0)


def double(module: nn.Module) -> nn.Module:
    """Float64, with biases and BN that matter."""
    module = module.double()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.3)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(23, 40), (11, 7), (1, 1)])
def test_multi_atrous_equals_literal_version(seeded, size):
    module = double(MultiAtrous(5, 4, branch_channels=3))
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    got = module(x)
    assert got.shape == (2, 4, *size)
    torch.testing.assert_close(got, literal_multi_atrous(module.state_dict(), x), rtol=1e-12, atol=1e-12)


def test_multi_atrous_gradients_equal_literal_version(seeded):
    module = double(MultiAtrous(4, 3, branch_channels=2))
    x = torch.randn(1, 4, 21, 20, dtype=torch.float64)
    weights = torch.randn(1, 3, 21, 20, dtype=torch.float64)
    (module(x) * weights).sum().backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    (literal_multi_atrous(leaves, x) * weights).sum().backward()
    for name, p in module.named_parameters():
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("branch", "dilation"), [(0, 0), (1, 6), (2, 12), (3, 18)])
def test_reach_of_each_branch(branch, dilation):
    """One bright position is seen where the branch's taps lie, and by the image average everywhere."""
    module = MultiAtrous(1, 1, branch_channels=1)
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 20] = 1.0
    with torch.no_grad():
        module.aspp[branch].weight.fill_(1.0)
        seen = module.aspp[branch](x) - module.aspp[branch].bias
    where = {tuple(position) for position in (seen[0, 0].abs() > 0.5).nonzero().tolist()}
    steps = (-dilation, 0, dilation)
    assert where == {(20 + dy, 20 + dx) for dy in steps for dx in steps}


def literal_attention(state: dict, x: torch.Tensor, statistics: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Position by position: BN, L2 norm of the values with their signs, softplus of a weighted sum of the positives."""
    w1, b1 = state["conv1.weight"][:, :, 0, 0], state["conv1.bias"]
    w2, b2 = state["conv2.weight"][0, :, 0, 0], state["conv2.bias"][0]
    mean, var = statistics
    batch, channels, height, width = x.shape
    local = torch.zeros(batch, channels, height, width, dtype=x.dtype)
    attention = torch.zeros(batch, 1, height, width, dtype=x.dtype)
    for b in range(batch):
        for y in range(height):
            for z in range(width):
                v = w1 @ x[b, :, y, z] + b1
                v = (v - mean) / (var + 1e-5) ** 0.5 * state["bn.weight"] + state["bn.bias"]
                a = math.log1p(math.exp(float(w2 @ v.clamp(min=0) + b2)))
                attention[b, 0, y, z] = a
                local[b, :, y, z] = a * v / math.sqrt(float(v @ v))
    return local, attention


@pytest.mark.parametrize("training", [False, True])
def test_attention_equals_literal_version(seeded, training):
    branch = double(LocalBranch(6, with_ma=False)).train(training)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    state = {key: value.clone() for key, value in branch.state_dict().items()}
    statistics = state["bn.running_mean"], state["bn.running_var"]
    if training:
        before = torch.einsum("oc,bchw->bohw", state["conv1.weight"][:, :, 0, 0], x) + state["conv1.bias"].view(
            1, -1, 1, 1
        )
        statistics = before.mean((0, 2, 3)), before.var((0, 2, 3), unbiased=False)
    with torch.no_grad():
        local, attention = branch(x)
    want_local, want_attention = literal_attention(state, x, statistics)
    torch.testing.assert_close(attention, want_attention, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(local, want_local, rtol=1e-10, atol=1e-12)
    # Normalised before the ReLU: the norm is the attention, and there are negative values.
    torch.testing.assert_close(local.norm(dim=1, keepdim=True), attention, rtol=1e-10, atol=1e-12)
    assert (local < 0).any() and (attention > 0).all()


def test_multi_atrous_module_stands_in_front(seeded):
    branch = double(LocalBranch(6, with_ma=True, branch_channels=4)).eval()
    plain = LocalBranch(6, with_ma=False).double().eval()
    plain.load_state_dict({key: value for key, value in branch.state_dict().items() if not key.startswith("aspp.")})
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        got = branch(x)
        want = plain(literal_multi_atrous(branch.aspp.state_dict(), x))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_ma", [False, True])
def test_published_names_and_shapes(with_ma):
    with torch.device("meta"):
        branch = LocalBranch(1024, with_ma=with_ma)
    own = [f"localmodel.{key} {'x'.join(map(str, v.shape)) or 'scalar'}" for key, v in branch.state_dict().items()]
    published = [line for line in NAMES.read_text().splitlines() if line.startswith("localmodel.")]
    assert own == [line for line in published if with_ma or not line.startswith("localmodel.aspp.")]


def test_batch_norm_settings():
    branch = LocalBranch(4, with_ma=False, bn_eps=1e-3, bn_momentum=0.25)
    assert (branch.bn.eps, branch.bn.momentum) == (1e-3, 0.25)


def test_initial_values(seeded):
    branch = LocalBranch(256, with_ma=True, branch_channels=64)
    for name, layer in branch.named_modules():
        if isinstance(layer, nn.Conv2d):
            out, inside, k, _ = layer.weight.shape
            want, n = math.sqrt(2 / (k * k * out)), layer.weight.numel()
            assert abs(layer.weight.std() / want - 1) < 5 / math.sqrt(2 * n), name
            bound = 1 / math.sqrt(inside * k * k)  # PyTorch's own default of a bias: uniform within it
            assert layer.bias.abs().max() <= bound, name
            assert layer.bias.abs().sum() > 0, name
            assert len(layer.bias) == 1 or layer.bias.abs().max() > 0.8 * bound, name
    assert torch.equal(branch.bn.weight, torch.ones(256)) and not branch.bn.bias.any()


def test_gradient_reaches_every_parameter(seeded):
    branch = double(LocalBranch(6, with_ma=True, branch_channels=4)).train()
    local, _ = branch(torch.randn(2, 6, 20, 20, dtype=torch.float64))
    (local * torch.randn_like(local)).sum().backward()
    for name, p in branch.named_parameters():
        # What conv1's bias adds, batch norm takes away again.
        assert name == "conv1.bias" or p.grad.abs().max() > 1e-6, name


def test_a_position_without_features_stays_finite():
    branch = LocalBranch(4, with_ma=False).train()
    nn.init.zeros_(branch.conv1.bias)
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    local, attention = branch(x)
    local.sum().backward()
    assert torch.equal(local, torch.zeros_like(local)) and attention.isfinite().all()
    assert all(p.grad.isfinite().all() for p in branch.parameters()) and x.grad.isfinite().all()
