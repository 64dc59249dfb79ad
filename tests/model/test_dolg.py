"""The descriptor network and its classifier: how the parts are joined, names, gradients, independence of images."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import resnet
from model.classifier import Classifier
from model.dolg import DOLG
from model.margin import build_head
from model.resnet import ResNet

NAMES = Path(__file__).parents[1] / "goldens" / "model" / "names_R50_MA.txt"


@pytest.fixture
def thin(monkeypatch):
    """Fewer channels: quick, and the code is the same."""
    monkeypatch.setattr(resnet, "STEM_WIDTH", 8)
    monkeypatch.setattr(resnet, "BASIC_WIDTHS", (8, 16, 24, 32))


def network(kind: str = "", *, seed: int = 0, dim: int = 10, **settings) -> DOLG:
    torch.manual_seed(seed)
    backbone = ResNet(18)
    if kind:
        model = Classifier(backbone, build_head(kind, dim, 7, scale=30.0, margin=0.15), dim=dim, **settings)
    else:
        model = DOLG(backbone, dim=dim, **settings)
    return model.double()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("with_ma", [False, True])
def test_descriptor_equals_its_parts_joined_by_hand(thin, with_ma):
    model = network(with_ma=with_ma).eval()
    model.pool_g.p.data.fill_(2.5)
    with torch.no_grad():
        f3, f4 = model.globalmodel(images(2, 3, 75, 64))
        g = f4.clamp(min=1e-6).pow(2.5).mean((2, 3)).pow(1 / 2.5) @ model.fc_t.weight.T + model.fc_t.bias
        local, _ = model.localmodel(f3)
        projection = torch.einsum("bc,bchw->bhw", g, local) / (g * g).sum(1)[:, None, None]
        orthogonal = local - torch.einsum("bhw,bc->bchw", projection, g)
        want = torch.cat([g, orthogonal.mean((2, 3))], dim=1) @ model.fc.weight.T + model.fc.bias
        got = model(images(2, 3, 75, 64))
    assert got.shape == (2, 10)
    assert (model.localmodel.aspp is not None) == with_ma
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_global_fusion_is_gem_and_fc_alone(thin):
    model = network(fusion="global").eval()
    assert {key.partition(".")[0] for key in model.state_dict()} == {"globalmodel", "pool_g", "fc"}
    with torch.no_grad():
        _, f4 = model.globalmodel(images(2, 3, 64, 64))
        want = f4.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3) @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(model(images(2, 3, 64, 64)), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_ma", [False, True])
def test_published_names_shapes_and_order(with_ma):
    """The order counts: the state of an optimiser knows the parameters by their number."""
    with torch.device("meta"):
        head = build_head("curricularface", 512, 10, scale=30.0, margin=0.15)
        model = Classifier(ResNet(50), head, with_ma=with_ma)
    own = [f"{key} {'x'.join(map(str, v.shape)) or 'scalar'}" for key, v in model.state_dict().items()]
    published = [line for line in NAMES.read_text().splitlines() if with_ma or "localmodel.aspp." not in line]
    assert own == published
    integers = {key for key, v in model.state_dict().items() if v.dtype != torch.float32}
    assert all(key.endswith("num_batches_tracked") for key in integers)


@pytest.mark.parametrize(("depth", "f3", "f4"), [(18, 256, 512), (101, 1024, 2048)])
@pytest.mark.parametrize("fusion", ["orthogonal", "global"])
def test_dimensions_follow_the_backbone(depth, f3, f4, fusion):
    with torch.device("meta"):
        model = DOLG(ResNet(depth), dim=77, fusion=fusion)
    assert model.fc.weight.shape == (77, 2 * f3 if fusion == "orthogonal" else f4)
    if fusion == "orthogonal":
        assert model.fc_t.weight.shape == (f3, f4)
        assert model.localmodel.conv1.weight.shape == (f3, f3, 1, 1)


def test_settings_reach_their_layers(thin):
    model = network(gem_p=4.5, gem_trainable=False, bn_eps=1e-3, bn_momentum=0.25)
    assert model.pool_g.p.item() == 4.5 and not model.pool_g.p.requires_grad
    assert (model.localmodel.bn.eps, model.localmodel.bn.momentum) == (1e-3, 0.25)
    assert network().pool_g.p.item() == 3.0


@pytest.mark.parametrize("settings", [{"with_ma": True}, {"fusion": "global"}, {"gem_trainable": False}])
def test_gradient_reaches_every_trained_parameter(thin, settings):
    model = network("curricularface", **settings).train()
    labels = torch.tensor([0, 6, 2])
    model(images(3, 3, 64, 64), labels)[0].backward()
    for name, p in model.named_parameters():
        if name == "pool_g.p" and not settings.get("gem_trainable", True):
            assert p.grad is None
        elif name != "localmodel.conv1.bias":  # batch norm takes it away again
            assert p.grad is not None and p.grad.abs().max() > 0, name
            assert p.grad.isfinite().all(), name


def test_an_image_does_not_depend_on_its_neighbours(thin):
    model = network(with_ma=True).eval()
    many = images(3, 3, 50, 70)
    with torch.no_grad():
        together, alone = model(many), torch.cat([model(many[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-6


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (161, 40), (8, 8)])
def test_any_size_gives_a_finite_descriptor(thin, size):
    model = network(with_ma=True).eval()
    with torch.no_grad():
        descriptor = model(images(1, 3, *size))
    assert descriptor.shape == (1, 10) and descriptor.isfinite().all()


def test_descriptor_is_not_normalised(thin):
    model = network().eval()
    with torch.no_grad():
        before = model(images(2, 3, 64, 64))
        model.fc.weight.mul_(3)
        model.fc.bias.mul_(3)
        torch.testing.assert_close(model(images(2, 3, 64, 64)), 3 * before)


@pytest.mark.parametrize("settings", [{}, {"fusion": "global"}])
def test_bfloat16_autocast(thin, settings):
    model = network("arcface", **settings).float().train()
    x, labels = images(4, 3, 64, 64).float(), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        exact = copy.deepcopy(model)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(x, labels)
        plain = model(x)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (plain - exact).abs().max() < 0.1 * 30
    assert not torch.equal(plain, exact)  # the convolutions did run in bfloat16


# ------------------------------------------------------------------------------------------------------ classifier


@pytest.mark.parametrize("kind", ["arcface", "curricularface", "cosine"])
def test_classifier_is_the_head_on_the_descriptor(thin, kind):
    model = network(kind).eval()
    model.desc_cls.train()  # with its margin
    descriptor_network = network()
    descriptor_network.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("desc_cls.")})
    descriptor_network.eval()
    x, labels = images(4, 3, 48, 48), torch.tensor([1, 6, 0, 3])
    with torch.no_grad():
        descriptor = descriptor_network(x)
        torch.testing.assert_close(model.descriptors(x), descriptor)
        head = copy.deepcopy(model.desc_cls)  # t is renewed by each call
        loss, ranks = model(x, labels)
        logits = head(descriptor, labels)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
        assert torch.equal(ranks, (logits > logits.gather(1, labels[:, None])).sum(dim=1))
        cosines = F.cosine_similarity(descriptor[:, None], model.desc_cls.weight[None], dim=2)
        torch.testing.assert_close(model(x), 30 * cosines)
        margin = (logits - model(x)).gather(1, labels[:, None])
    assert (margin == 0).all() if kind == "cosine" else (margin < 0).all()


def test_inference_has_neither_head_nor_labels(thin):
    model = network()
    assert not hasattr(model, "desc_cls")
    with pytest.raises(TypeError):
        model(images(1, 3, 32, 32), torch.tensor([0]))


def test_initial_values(thin):
    for model in (network(), network(with_ma=True), network(fusion="global"), network("arcface")):
        for name, p in model.named_parameters():
            assert p.isfinite().all() and (name.endswith("bn.bias") or p.abs().sum() > 0), name
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):  # PyTorch's own default
            bound = layer.in_features**-0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert 0 < layer.bias.abs().max() <= bound
