"""The network arranged for speed against the one that is trained, and against the published numbers."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from datasets.images.decode import decode
from datasets.transforms import preprocess
from evaler.extraction.multiscale import describe_batch
from evaler.sources.images import crop
from model import aspp, attention, dolg, fusion, gem, inference, resnet
from model.dolg import DOLG
from model.folding import FusedConv, How, can_fuse, fold
from model.inference import for_inference
from model.resnet import ResNet
from tests.small_run import ROOT, photograph, python, script
from tests.test_goldens import BOX, GOLDENS, IMAGE, recipe_weights

SCALES = (0.3535, 0.5, 0.7071, 1.0, 1.4142)
# Wherever a test does not expect it, the plain network in place of the arranged one is a failure.
pytestmark = pytest.mark.filterwarnings("error:.*the plain one is used")


def randomised(network: DOLG, seed: int = 0) -> DOLG:
    """BN statistics, scales and biases as if it were trained, so that every one of them counts."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 1.5)):
                tensor.uniform_(low, high, generator=generator)
            nn.init.uniform_(layer.weight, 0.2, 0.9, generator=generator)
            nn.init.uniform_(layer.bias, -0.3, 0.3, generator=generator)
    return network.eval()


@functools.cache
def _built(depth: int, settings: str) -> DOLG:
    torch.manual_seed(0)
    settings = json.loads(settings)
    backbone = {"width_per_group": 4} if depth > 34 else {}
    return randomised(DOLG(ResNet(depth, **backbone, **settings.pop("backbone", {})), dim=24, **settings))


def small(depth: int = 18, **settings) -> DOLG:
    return copy.deepcopy(_built(depth, json.dumps(settings)))


def distances(found: torch.Tensor | np.ndarray, wanted: torch.Tensor | np.ndarray) -> np.ndarray:
    """1 - cosine of the rows, in float64: half the squared distance of the unit vectors."""
    found, wanted = (np.asarray(rows, np.float64) for rows in (found, wanted))
    found, wanted = (rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (found, wanted))
    return np.square(found - wanted).sum(axis=-1) / 2


def inputs(batch: int = 2, height: int = 75, width: int = 107) -> torch.Tensor:
    images = [preprocess(photograph(seed, height, width), 1.0) for seed in range(batch)]
    return torch.from_numpy(np.stack(images))


NETWORKS = {
    "multi-atrous": {"with_ma": True},
    "without": {"gem_p": 2.6},
    "bottlenecks": {"depth": 50},
    "groups": {"depth": 50, "fusion": "global", "backbone": {"groups": 4}},
    "stride in the 1x1": {"depth": 50, "fusion": "global", "backbone": {"stride_1x1": True}},
}


@pytest.fixture(params=["fused", "plain"])
def way(request, monkeypatch) -> str:
    """Both ways of running it: fused where this processor can, and as it is done everywhere else."""
    if request.param == "plain":
        monkeypatch.setattr(inference, "can_fuse", lambda device, dtype: False)
    elif not can_fuse(torch.device("cpu"), torch.float32):
        pytest.skip("NOT CHECKED: oneDNN's fused convolutions are not to be had on this processor")
    return request.param


@pytest.mark.parametrize("name", NETWORKS)
def test_the_descriptors_stay(name, way):
    network, images = small(**NETWORKS[name]), inputs()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
        plain = network(images)
    found = for_inference(network)(images)
    assert found.dtype == torch.float32 and found.shape == (2, 24)
    # Not normalised: the length must stay too. Both are float32 sums in another order.
    scale = exact.abs().max()
    assert (found - exact).abs().max() <= max(3e-6 * scale, 3 * (plain - exact).abs().max())
    assert distances(found, exact).max() < 1e-10


@pytest.mark.parametrize("size", [(33, 200), (17, 19), (64, 64), (300, 40)])
def test_maps_smaller_than_the_dilations(size, way):
    network, images = small(with_ma=True), inputs(1, *size)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
    assert distances(for_inference(network)(images), exact).max() < 1e-10


def test_the_network_is_left_as_it_was_and_nothing_is_shared(way):
    network, images = small(with_ma=True), inputs()
    state = copy.deepcopy(network.state_dict())
    given = images.clone()
    arranged = for_inference(network)
    first = arranged(images)
    assert torch.equal(images, given), "the block's sum is made in place, but not in what the caller gave"
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(arranged(images), first)


def test_channels_last_or_not_is_the_same():
    arranged, images = for_inference(small(with_ma=True)), inputs()
    assert torch.equal(arranged(images), arranged(images.contiguous(memory_format=torch.channels_last)))


def test_batches_give_what_single_images_give(way):
    arranged, images = for_inference(small(with_ma=True)), inputs(3)
    single = torch.cat([arranged(image[None]) for image in images])
    batch = arranged(images)
    assert distances(batch, single).max() <= 1e-12
    torch.testing.assert_close(batch, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 1e-3), ("fp16", 1e-5)])
def test_lower_precisions(precision, tolerance, way):
    network, images = small(with_ma=True), inputs(2, 48, 64)
    with torch.no_grad():
        exact = network(images)
    found = for_inference(network, precision=precision)(images)
    assert found.dtype == torch.float32
    assert 1e-9 < distances(found, exact).max() < tolerance


def test_an_unknown_precision_and_training_mode_are_refused():
    with pytest.raises(ValueError, match="precision 'tf32' is none of fp32, bf16, fp16"):
        for_inference(small(), precision="tf32")
    with pytest.raises(AssertionError, match="eval mode"):
        for_inference(small().train())


def test_no_setting_of_torch_is_touched(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    arranged = for_inference(small())
    arranged.network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    arranged(inputs(1, 40, 40))
    assert seen == [True] and torch.backends.cudnn.allow_tf32


def test_every_batch_norm_is_gone():
    arranged = for_inference(small(with_ma=True))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in arranged.modules())
    assert not any(parameter.requires_grad for parameter in arranged.parameters())


# ------------------------------------------------------------------------------- a layer edited without its fast form


def with_maximum(local: torch.Tensor, global_: torch.Tensor) -> torch.Tensor:
    """`orthogonal_fusion`, but for the mean."""
    return torch.cat([global_, fusion.orthogonal_component(local.amax(dim=(2, 3)), global_)], dim=1)


def with_sigmoid(self: attention.LocalBranch, f3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`LocalBranch.forward`, but for the activation."""
    x = self.bn(self.conv1(f3 if self.aspp is None else self.aspp(f3)))
    weights = torch.sigmoid(self.conv2(x.relu()))
    return weights * nn.functional.normalize(x, dim=1), weights


def halved_shortcut(self: resnet.ResBlock, x: torch.Tensor) -> torch.Tensor:
    return self.relu(0.5 * (x if self.proj is None else self.bn(self.proj(x))) + self.f(x))


def no_relu(self: resnet.BottleneckTransform, x: torch.Tensor) -> torch.Tensor:
    return self.c_bn(self.c(self.b_bn(self.b(self.a_relu(self.a_bn(self.a(x)))))))


def other_dilations(self: aspp.MultiAtrous, f3: torch.Tensor) -> torch.Tensor:
    image = self.im_pool(f3).expand(-1, -1, *f3.shape[2:])
    first, *others, last = self.aspp
    shifted = nn.functional.conv2d(f3, last.weight, last.bias, padding=17, dilation=17)
    return self.conv_after(torch.cat([image, first(f3), *(conv(f3) for conv in others), shifted], dim=1))


EDITS = {
    "fusion": (dolg, "orthogonal_fusion", with_maximum),
    "attention": (attention.LocalBranch, "forward", with_sigmoid),
    "multi-atrous": (aspp.MultiAtrous, "forward", other_dilations),
    "block": (resnet.ResBlock, "forward", halved_shortcut),
    "transform": (resnet.BottleneckTransform, "forward", no_relu),
}


@pytest.mark.parametrize(
    "edit, precision", [(edit, p) for edit in EDITS for p in ("fp32", "bf16") if (edit, p) != ("multi-atrous", "bf16")]
)
def test_an_edited_layer_is_followed(edit, precision, way, monkeypatch):
    network = small(50) if edit == "transform" else small(with_ma=True)
    images = inputs(1, 100, 310) if edit == "multi-atrous" else inputs(1)  # or the wider taps lie outside of f3
    before = for_inference(network)(images)
    monkeypatch.setattr(*EDITS[edit])
    with torch.no_grad():
        edited = network(images)
    assert distances(edited, before).max() > 1e-9, "the edit shows"
    with pytest.warns(UserWarning, match="at fp32 the network arranged for speed is .* the plain one is used"):
        arranged = for_inference(network, precision=precision)
    torch.testing.assert_close(arranged(images), edited, rtol=1e-4, atol=1e-6)


def test_what_is_edited_in_both_needs_no_fallback(monkeypatch):
    """The pooling, the linear layers and the stem's pooling are the layers themselves."""
    network = small(with_ma=True)
    network.globalmodel.stem.pool = nn.AvgPool2d(3, stride=2, padding=1)
    monkeypatch.setattr(gem.GeM, "forward", lambda self, maps: maps.float().amax(dim=(2, 3)))
    images = inputs(1)
    with torch.no_grad():
        edited = network(images)
    arranged = for_inference(network)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in arranged.modules())
    assert distances(arranged(images), edited).max() < 1e-10


@pytest.mark.parametrize("precision", inference.DTYPES)
def test_unedited_networks_are_well_within_the_bound(precision, way):
    network = small(with_ma=True)
    arranged = for_inference(network, precision=precision)
    assert inference._distance(network, arranged, halves=precision == "fp32") < inference.BOUNDS[precision] / 5


def test_a_local_half_that_nearly_vanishes_is_no_edit(way):
    """In bf16 it then is mostly rounding, while the descriptor is not: the fast form stays."""
    network = small(with_ma=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *inference.CHECKED_SIZE, generator=generator)
    with torch.no_grad():  # the global vector points nearly where the local ones do on average
        mean = network.localmodel(network.globalmodel(image)[0])[0].mean(dim=(0, 2, 3))
        aside = torch.randn(len(mean), generator=generator)
        network.fc_t.weight.zero_()
        network.fc_t.bias.copy_(mean / mean.norm() + 0.01 * aside / aside.norm())
    arranged = for_inference(network, precision="bf16")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in arranged.modules())


def test_a_plain_network_shares_nothing_either(monkeypatch):
    network, images = small(), inputs(1)
    monkeypatch.setattr(*EDITS["fusion"])
    with pytest.warns(UserWarning):
        arranged = for_inference(network)
    first = arranged(images)
    with torch.no_grad():
        network.fc.weight.zero_()
    assert torch.equal(arranged(images), first) and not any(p.requires_grad for p in arranged.parameters())
    assert network.fc.weight.requires_grad


def test_a_network_that_gives_nothing_finite_is_left_to_those_who_describe():
    network = small()
    with torch.no_grad():
        network.fc.bias.fill_(torch.nan)
    assert for_inference(network)(inputs(1)).isnan().all()


# ----------------------------------------------------------------------------------------------- one convolution


def test_folding_is_exact_in_float64():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(6, 8, 3, groups=2, bias=True).double(), nn.BatchNorm2d(8, eps=1e-3).double().eval()
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.01, 2)
    nn.init.uniform_(bn.weight, -1, 1), nn.init.uniform_(bn.bias, -1, 1)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    weight, bias = fold(conv, bn)
    found = torch.nn.functional.conv2d(x, weight, bias, groups=2)
    torch.testing.assert_close(found, bn(conv(x)), rtol=1e-12, atol=1e-12)
    assert fold(conv.float(), bn.float())[0].dtype == torch.float64


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_sum", [False, True])
def test_fused_and_plain_convolutions_agree(relu, with_sum):
    if not can_fuse(torch.device("cpu"), torch.float32):
        pytest.skip("NOT CHECKED: oneDNN's fused convolutions are not to be had on this processor")
    torch.manual_seed(0)
    geometry = {"stride": (2, 1), "padding": (3, 2), "dilation": (1, 2)}  # rows and columns must not be mixed up
    weight, bias, x = torch.randn(16, 8, 3, 2), torch.randn(16), torch.randn(2, 8, 20, 15)
    x = x.contiguous(memory_format=torch.channels_last)
    plain, fused = (
        FusedConv(weight, bias, how=How(torch.float32, fused), relu=relu, **geometry) for fused in (False, True)
    )
    add = torch.randn_like(plain(x)) if with_sum else None
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), *geometry.values())
    wanted = wanted + add if with_sum else wanted
    wanted = wanted.relu() if relu else wanted
    for conv in (plain, fused):
        found = conv(x, None if add is None else add.clone(memory_format=torch.preserve_format))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ runs and processes


def test_the_same_bytes_in_every_run_and_process(tmp_path):
    """At one thread, which is also what a child of the tests has."""
    image = np.random.default_rng(0).integers(0, 256, (1, 131, 97, 3), np.uint8)
    arranged = for_inference(small(with_ma=True))
    runs = {describe_batch(arranged, image, scales=SCALES).tobytes().hex() for _ in range(3)}
    np.save(tmp_path / "image.npy", image)
    torch.save(small(with_ma=True).state_dict(), tmp_path / "weights.pt")
    program = script(tmp_path, f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{DESCRIBE}")
    ended = python(program, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert runs == {ended.stdout.strip()}


DESCRIBE = f"""
import numpy as np
import torch
from evaler.extraction.multiscale import describe_batch
from model.dolg import DOLG
from model.inference import for_inference
from model.resnet import ResNet
network = DOLG(ResNet(18), dim=24, with_ma=True).eval()
network.load_state_dict(torch.load("weights.pt"))
print(describe_batch(for_inference(network), np.load("image.npy"), scales={SCALES}).tobytes().hex())
"""


# -------------------------------------------------------------------------------------------------------- the goldens


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in recipe_weights("R50_MA").items()}


def golden_network(weights: dict[str, torch.Tensor], variant: str) -> DOLG:
    network = DOLG(ResNet(50), with_ma=variant == "R50_MA")
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return network.eval()


@pytest.mark.parametrize("variant", ["R50_MA", pytest.param("R50_noMA", marks=pytest.mark.soak)])
def test_golden_descriptors(golden_weights, variant, way):
    golden = np.load(GOLDENS / "model" / "network.npz")
    arranged = for_inference(golden_network(golden_weights, variant))
    image = crop(decode(IMAGE), BOX)
    batch = describe_batch(arranged, np.stack([image, image[::-1]]), scales=SCALES)
    for found in (describe_batch(arranged, image[None], scales=SCALES)[0], batch[0]):
        assert distances(found[::4], golden[f"{variant}/crop.feature"]) <= 1e-6
    assert distances(batch[1, ::4], golden[f"{variant}/crop.feature"]) > 1e-3


def test_golden_descriptors_in_bf16(golden_weights):
    golden = np.load(GOLDENS / "model" / "network.npz")
    arranged = for_inference(golden_network(golden_weights, "R50_MA"), precision="bf16")
    found = describe_batch(arranged, crop(decode(IMAGE), BOX)[None], scales=SCALES)[0]
    assert 1e-8 < distances(found[::4], golden["R50_MA/crop.feature"]) <= 1e-4


@pytest.mark.soak
def test_golden_descriptors_of_a_whole_image(golden_weights, shared):
    golden = np.load(shared / "goldens" / "golden" / "model_R50_MA.npz")
    image = decode(shared / "goldens" / "images" / "syn_224x224.png")
    found = describe_batch(for_inference(golden_network(golden_weights, "R50_MA")), image[None], scales=SCALES)[0]
    assert distances(found, golden["syn_224x224.png/f64/full.feature"]) <= 1e-6


@pytest.mark.soak
def test_golden_descriptors_when_compiled(golden_weights):
    golden = np.load(GOLDENS / "model" / "network.npz")
    arranged = for_inference(golden_network(golden_weights, "R50_MA"), compiled=True)
    found = describe_batch(arranged, crop(decode(IMAGE), BOX)[None], scales=SCALES)[0]
    assert distances(found[::4], golden["R50_MA/crop.feature"]) <= 1e-6


@pytest.mark.soak
def test_compiled_for_any_size():
    network = small(18, with_ma=True)
    arranged = for_inference(network, compiled=True)
    for size in ((2, 40, 56), (3, 72, 33)):
        images = inputs(*size)
        assert distances(arranged(images), for_inference(network)(images)).max() < 1e-10
