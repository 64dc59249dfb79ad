"""Every form of weight file that exists, loaded; everything else refused in one line, with the model unchanged."""

import collections
import io
import pickle
import random
import re
import resource
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from model import resnet
from model.classifier import Classifier
from model.dolg import DOLG
from model.margin import build_head
from model.resnet import ResNet
from model.weights.loading import (
    WeightsError,
    architecture,
    load_initial,
    load_strict,
    normalise_names,
    read_checkpoint,
)

NAMES = Path(__file__).parents[2] / "goldens" / "model" / "names_R50_MA.txt"


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """Few channels, the same names: files of some hundred kilobytes."""
    monkeypatch.setattr(resnet, "STEM_WIDTH", 4)
    monkeypatch.setattr(resnet, "BASIC_WIDTHS", (4, 6, 8, 10))
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (6, 8, 10, 12))


def read_state(path):
    """As core/checkpoints/checkpoint.py reads weights."""
    return normalise_names(read_checkpoint(path), source=str(path))


def backbone(depth: int = 50, *, groups: int = 1, width_per_group: int = 2) -> ResNet:
    return ResNet(depth, groups=groups, width_per_group=width_per_group)


def descriptor(seed: int = 0, *, depth: int = 50, dim: int = 5, **settings) -> DOLG:
    torch.manual_seed(seed)
    return DOLG(backbone(depth), dim=dim, **settings)


def classifier(
    seed: int = 0, *, depth: int = 50, dim: int = 5, kind: str = "arcface", classes: int = 7, body=None, **settings
) -> Classifier:
    torch.manual_seed(seed)
    head = build_head(kind, dim, classes, scale=30.0, margin=0.15)
    return Classifier(body or backbone(depth), head, dim=dim, **settings)


def imagenet_state(body: ResNet | None = None) -> dict[str, torch.Tensor]:
    """What pycls writes: the backbone without prefix, and its classifier."""
    torch.manual_seed(9)
    body = body or backbone()
    width = body.widths[-1]
    return {**body.state_dict(), "head.fc.weight": torch.randn(1000, width), "head.fc.bias": torch.randn(1000)}


def published(state: dict) -> dict:
    """The layout of the checkpoints of pycls, of the release and of this code."""
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 4, "model_state": state, "optimizer_state": optimizer, "cfg": "MODEL:\n  DEPTH: 50\n"}


def save(tmp_path: Path, content, *, legacy: bool = False) -> Path:
    path = tmp_path / "weights.pyth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def refusal(load, model: torch.nn.Module | None = None) -> str:
    """The message of the `WeightsError` that `load` raises: one line, and nothing printed or changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()} if model is not None else {}
    with warnings.catch_warnings(record=True) as printed, pytest.raises(WeightsError) as caught:
        warnings.simplefilter("always")
        load()
    assert not printed
    message = str(caught.value)
    assert "\n" not in message and "weights.pyth" in message and len(message) < 700
    assert model is None or same(before, model.state_dict())
    return message


def refused_both_ways(state: dict, model: torch.nn.Module) -> str:
    """Strict and initial loading refuse with the same words."""
    strict = refusal(lambda: load_strict(model, state, source="weights.pyth"), model)
    assert refusal(lambda: load_initial(model, state, source="weights.pyth"), model) == strict
    return strict


# ------------------------------------------------------------------------------------------- forms that are accepted


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", [published, dict])
def test_forms_of_a_complete_file(tmp_path, layout, prefix, legacy):
    source, target = (
        classifier(1, kind="curricularface", with_ma=True),
        classifier(2, kind="curricularface", with_ma=True),
    )
    source.desc_cls.t.fill_(0.25)
    state = collections.OrderedDict((prefix + key, value) for key, value in source.state_dict().items())
    path = save(tmp_path, layout(state), legacy=legacy)
    assert not same(source.state_dict(), target.state_dict())
    assert load_strict(target, read_state(path), source=str(path)) == []
    assert same(source.state_dict(), target.state_dict())
    again = classifier(3, kind="curricularface", with_ma=True)
    assert load_initial(again, read_state(path), source=str(path)) == []
    assert same(source.state_dict(), again.state_dict())


def test_checkpoint_keeps_what_lies_beside_the_weights(tmp_path):
    content = published(descriptor().state_dict())
    read = read_checkpoint(save(tmp_path, content))
    assert (read["epoch"], read["cfg"], read["optimizer_state"]["param_groups"]) == (
        4,
        content["cfg"],
        [{"lr": 0.1, "params": [0]}],
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_numbers_of_numpy_and_bytes(tmp_path, protocol, legacy):
    """pycls takes the rate of a cosine by NumPy, and it is saved as it is. Other settings of `torch.save` count too."""
    path = tmp_path / "weights.pyth"
    numbers = [np.cos(1.0), np.float32(0.1), np.float16(0.1), np.int64(-5), np.uint64(2**64 - 1), np.int8(-1), np.True_]
    content = {"model_state": {"fc.weight": torch.ones(2)}, "numbers": numbers, "bytes": b"\xff\0", "test_err": np.pi}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path)
    plain = [number.item() for number in numbers]
    assert found["numbers"] == plain and list(map(type, found["numbers"])) == list(map(type, plain))
    assert (found["bytes"], found["test_err"]) == (b"\xff\0", np.pi)


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_values_that_no_weight_comes_from(tmp_path, legacy):
    beside = {"dtype": torch.float16, "place": torch.device("cpu"), "milestones": collections.Counter([3]), "z": 1j}
    state = {"fc.weight": torch.ones(2)}
    path = save(tmp_path, {"model_state": state, **beside, "set": {1}}, legacy=legacy)
    assert same(read_state(path), state)
    refusal(
        lambda: normalise_names({"model_state": {"fc.weight": read_checkpoint(path)["set"]}}, source="weights.pyth")
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_that_is_stored_with_the_other_sign(tmp_path, legacy):
    negated = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
    path = save(tmp_path, {"fc.weight": negated}, legacy=legacy)
    assert torch.load(path)["fc.weight"].tolist() == [-1, -1]
    assert "resolve_neg" in refusal(lambda: read_checkpoint(path))


def test_a_file_whose_checksums_were_switched_off(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, {"fc.weight": torch.ones(2)})
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_checkpoint(path), {"fc.weight": torch.ones(2)})


def test_half_precision_weights_are_converted():
    target = descriptor(1)
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in descriptor(2).state_dict().items()
    }
    load_strict(target, state, source="x")
    assert target.fc.weight.dtype == torch.float32
    assert torch.equal(target.fc.weight, descriptor(2).fc.weight.half().float())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", [published, dict])
def test_imagenet_file(tmp_path, layout, prefix, legacy):
    state = imagenet_state()
    path = save(tmp_path, layout({prefix + key: value for key, value in state.items()}), legacy=legacy)
    model = classifier(1, kind="curricularface", with_ma=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lacking, aside = load_initial(model, read_state(path), source=str(path))
    after = model.state_dict()
    for key, value in after.items():
        if key.startswith("globalmodel."):
            assert torch.equal(value, state[key.removeprefix("globalmodel.")]), key
        else:
            assert torch.equal(value, before[key]), key
    rest = [key for key in after if not key.startswith("globalmodel.")]
    assert lacking == (
        f"{path}: not in the file, left at their initial values: "
        f"desc_cls, fc, fc_t, localmodel, pool_g ({len(rest)} tensors)"
    )
    assert aside == f"{path}: left aside: head.fc.bias, head.fc.weight (2 tensors)"


def test_imagenet_names_are_those_of_pycls():
    """The names in such a file, as published for R50, are the backbone's and nothing else is missing."""
    names = [line.split()[0] for line in NAMES.read_text().splitlines()]
    pycls = {name.removeprefix("globalmodel.") for name in names if name.startswith("globalmodel.")}
    assert pycls == set(imagenet_state()) - {"head.fc.weight", "head.fc.bias"}
    renamed = normalise_names(imagenet_state(), source="x")
    assert set(renamed) == {f"globalmodel.{name}" for name in pycls} | {"head.fc.weight", "head.fc.bias"}


def test_bare_backbone_under_dolg_names():
    """Without ImageNet's classifier there is nothing to leave aside."""
    model = classifier(1, fusion="global")
    state = {f"globalmodel.{key}": value for key, value in backbone().state_dict().items()}
    (note,) = load_initial(model, state, source="x")
    assert (
        note
        == "x: not in the file, left at their initial values: desc_cls.weight, fc.bias, fc.weight, pool_g.p (4 tensors)"
    )
    assert same(model.globalmodel.state_dict(), {k.removeprefix("globalmodel."): v for k, v in state.items()})


def test_imagenet_file_is_not_enough_to_extract_with():
    model = descriptor()
    state = normalise_names(imagenet_state(), source="weights.pyth")
    message = refusal(lambda: load_strict(model, state, source="weights.pyth"), model)
    assert "lacks fc, fc_t, localmodel, pool_g" in message and "unknown head.fc.bias, head.fc.weight" in message


@pytest.mark.parametrize("kind", ["arcface", "curricularface", "cosine"])
def test_other_number_of_classes(kind):
    model, state = classifier(1, kind=kind, classes=7), classifier(2, kind="curricularface", classes=4).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    notes = load_initial(model, state, source="x")
    head = "desc_cls.t, desc_cls.weight (2 tensors)" if kind == "curricularface" else "desc_cls.weight (1 tensor)"
    assert notes == [
        f"x: not in the file, left at their initial values: {head}",
        "x: left aside: desc_cls.t, desc_cls.weight (2 tensors), 4 classes",
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("desc_cls.") else state[key]), key
    message = refusal(lambda: load_strict(model, state, source="weights.pyth"), model)
    assert "MODEL.NUM_CLASSES 4 (here 7)" in message


@pytest.mark.parametrize(
    ("in_file", "here", "note"),
    [
        ("curricularface", "arcface", "x: left aside: desc_cls.t (1 tensor)"),
        ("arcface", "curricularface", "x: not in the file, left at their initial values: desc_cls.t (1 tensor)"),
        ("cosine", "arcface", None),
    ],
)
def test_other_kind_of_head(in_file, here, note):
    model, state = classifier(1, kind=here), classifier(2, kind=in_file).state_dict()
    assert load_initial(model, state, source="x") == ([note] if note else [])
    assert torch.equal(model.desc_cls.weight, state["desc_cls.weight"])
    model = classifier(1, kind=here)
    if note:
        message = refusal(lambda: load_strict(model, state, source="weights.pyth"), model)
        assert "desc_cls.t (1 tensor)" in message
        assert ("unknown" if in_file == "curricularface" else "lacks") in message
    else:
        assert load_strict(model, state, source="x") == []


def test_descriptor_network_as_initial_weights_lacks_the_head_only():
    model = classifier(1)
    (note,) = load_initial(model, descriptor(2).state_dict(), source="x")
    assert note == "x: not in the file, left at their initial values: desc_cls.weight (1 tensor)"
    assert torch.equal(model.fc.weight, descriptor(2).fc.weight)


@pytest.mark.parametrize("kind", ["arcface", "curricularface"])
def test_trained_network_to_extract_with_leaves_the_head_aside(tmp_path, kind):
    trained, model = classifier(1, kind=kind), descriptor(2)
    path = save(tmp_path, published(trained.state_dict()))
    (note,) = load_strict(model, read_state(path), source=str(path))
    names = "desc_cls.weight (1 tensor)" if kind == "arcface" else "desc_cls.t, desc_cls.weight (2 tensors)"
    assert note == f"{path}: the classification head is left aside ({names})"
    assert same(model.state_dict(), {k: v for k, v in trained.state_dict().items() if not k.startswith("desc_cls.")})


def test_loading_leaves_file_and_model_apart():
    state = descriptor(1).state_dict()
    model = descriptor(2)
    load_strict(model, state, source="x")
    with torch.no_grad():
        model.fc.weight.zero_()
    assert state["fc.weight"].any()


# ------------------------------------------------------------------------------------------- another architecture


def test_other_depth():
    for in_file, here in ((50, 101), (101, 50), (18, 34), (34, 50), (50, 34)):
        message = refused_both_ways(classifier(depth=in_file).state_dict(), classifier(depth=here))
        assert f"MODEL.DEPTH {in_file} (here {here})" in message
        imagenet = normalise_names(imagenet_state(backbone(in_file)), source="weights.pyth")
        model = classifier(depth=here)
        message = refusal(lambda m=model, s=imagenet: load_initial(m, s, source="weights.pyth"), model)
        assert f"MODEL.DEPTH {in_file} (here {here})" in message


def test_unknown_depth():
    state = {key: value for key, value in classifier().state_dict().items() if not key.startswith("globalmodel.s3.b6.")}
    message = refused_both_ways(state, classifier())
    assert "MODEL.DEPTH unknown (bottleneck blocks [3, 4, 5, 3]) (here 50)" in message


def test_resnext_groups_both_ways():
    plain, grouped = classifier(), classifier(body=backbone(groups=2))
    assert "RESNET.NUM_GROUPS 2 (here 1)" in refused_both_ways(grouped.state_dict(), plain)
    assert "RESNET.NUM_GROUPS 1 (here 2)" in refused_both_ways(plain.state_dict(), grouped)
    # As many channels in the 3x3 convolution, other groups.
    grouped, fewer = classifier(body=backbone(groups=4)), classifier(body=backbone(groups=2, width_per_group=4))
    message = refused_both_ways(fewer.state_dict(), grouped)
    assert "RESNET.NUM_GROUPS 2 (here 4)" in message and "RESNET.WIDTH_PER_GROUP 4 (here 2)" in message


def test_multi_atrous_both_ways():
    with_ma, without = classifier(with_ma=True), classifier(with_ma=False)
    assert "MODEL.WITH_MA True (here False)" in refused_both_ways(with_ma.state_dict(), without)
    assert "MODEL.WITH_MA False (here True)" in refused_both_ways(without.state_dict(), with_ma)


def test_descriptor_dimension():
    message = refused_both_ways(classifier(dim=6).state_dict(), classifier(dim=5))
    assert "MODEL.HEADS.REDUCTION_DIM 6 (here 5)" in message


def test_widths(monkeypatch):
    narrow = classifier()
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (6, 8, 14, 16))
    message = refused_both_ways(narrow.state_dict(), classifier())
    for fact in ("MODEL.S3_DIM 10 (here 14)", "MODEL.S4_DIM 12 (here 16)", "MODEL.HEADS.IN_FEAT 20 (here 28)"):
        assert fact in message
    # The ImageNet file shows no such fact, only its shapes.
    imagenet = {f"globalmodel.{key}": value for key, value in narrow.globalmodel.state_dict().items()}
    model = classifier()
    message = refusal(lambda: load_initial(model, imagenet, source="weights.pyth"), model)
    assert "other shapes: globalmodel.s3.b1.proj.weight [10, 8, 1, 1] (here [14, 8, 1, 1])" in message


def test_fusion_both_ways():
    dolg, baseline = classifier(), classifier(fusion="global")
    assert "MODEL.FUSION orthogonal (here global)" in refused_both_ways(dolg.state_dict(), baseline)
    assert "MODEL.FUSION global (here orthogonal)" in refused_both_ways(baseline.state_dict(), dolg)


def test_architecture_by_configuration_keys():
    facts = architecture(classifier(with_ma=True, classes=7, body=backbone(groups=2)).state_dict())
    assert facts == {
        "MODEL.TYPE": "resnet",
        "MODEL.DEPTH": 50,
        "RESNET.NUM_GROUPS": 2,
        "RESNET.WIDTH_PER_GROUP": 2,
        "MODEL.FUSION": "orthogonal",
        "MODEL.WITH_MA": True,
        "MODEL.HEADS.IN_FEAT": 20,
        "MODEL.HEADS.REDUCTION_DIM": 5,
        "MODEL.S3_DIM": 10,
        "MODEL.S4_DIM": 12,
        "MODEL.NUM_CLASSES": 7,
    }
    for depth in (18, 34, 50, 101, 152):
        assert architecture(normalise_names(imagenet_state(backbone(depth)), source="x"))["MODEL.DEPTH"] == depth


# ------------------------------------------------------------------------------------------- incomplete or too much


@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        ("globalmodel.s4.b3.f.c_bn.running_mean", "lacks globalmodel.s4.b3.f.c_bn.running_mean (1 tensor)"),
        ("globalmodel.stem.", "lacks globalmodel.stem (5 tensors)"),
        ("globalmodel.s4.", "lacks globalmodel.s4"),
        ("globalmodel.", "lacks globalmodel.s1, globalmodel.s2, globalmodel.s3, globalmodel.s4, globalmodel.stem"),
        ("pool_g.p", "lacks pool_g.p (1 tensor)"),
        ("fc.", "lacks fc.bias, fc.weight (2 tensors)"),
        ("fc_t.", ""),
        ("localmodel.", "lacks localmodel (8 tensors)"),
        ("localmodel.conv2.bias", "lacks localmodel.conv2.bias (1 tensor)"),
    ],
)
def test_parts_that_are_absent(dropped, words):
    state = {key: value for key, value in classifier().state_dict().items() if not key.startswith(dropped)}
    message = refused_both_ways(state, classifier())
    assert words in message


@pytest.mark.parametrize("dropped", ["s4.b3.f.c_bn.running_mean", "stem.bn", "s4.", "s2.b4."])
def test_partial_imagenet_backbone(dropped):
    state = {key: value for key, value in imagenet_state().items() if not key.startswith(dropped)}
    model = classifier()
    state = normalise_names(state, source="weights.pyth")
    message = refusal(lambda: load_initial(model, state, source="weights.pyth"), model)
    assert "globalmodel." in message or "MODEL.DEPTH unknown (bottleneck blocks [3, 3, 6, 3]) (here 50)" in message


@pytest.mark.parametrize("key", ["globalmodel.s5.b1.f.a.weight", "fc2.weight", "localmodel.conv3.bias", "t"])
def test_surplus_keys(key):
    state = {**classifier().state_dict(), key: torch.ones(1)}
    assert f"unknown {key} (1 tensor)" in refused_both_ways(state, classifier())


def test_many_surplus_keys_stay_one_short_line():
    state = {**classifier().state_dict(), **{f"branch{i}.layer.weight": torch.ones(1) for i in range(500)}}
    message = refused_both_ways(state, classifier())
    assert "unknown branch0, branch1, " in message and ", ... (500 tensors)" in message


def test_some_keys_with_the_prefix_of_ddp():
    state = classifier().state_dict()
    mixed = {("module." if key.startswith("fc.") else "") + key: value for key, value in state.items()}
    both = {**state, "module.fc.bias": torch.zeros(5)}
    assert "unknown module.fc.bias, module.fc.weight" in refused_both_ways(
        normalise_names(mixed, source="x"), classifier()
    )
    assert "unknown module.fc.bias" in refused_both_ways(normalise_names(both, source="x"), classifier())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fc.bias", torch.ones(6), "fc.bias [6] (here [5])"),
        ("fc.weight", torch.ones(3), "fc.weight [3] (here [5, 20])"),
        ("fc_t.weight", torch.ones(()), "fc_t.weight [] (here [10, 12])"),
        ("globalmodel.s1.b1.f.b.weight", torch.ones(2, 0), "globalmodel.s1.b1.f.b.weight [2, 0] (here [2, 2, 3, 3])"),
        ("globalmodel.s1.b1.f.b.weight", torch.ones(2, 0, 3, 3), "[2, 0, 3, 3] (here [2, 2, 3, 3])"),
        ("pool_g.p", torch.ones(()), "pool_g.p [] (here [1])"),
        ("fc.bias", torch.ones(5, dtype=torch.int8), "fc.bias [5] of torch.int8 (here [5])"),
    ],
)
def test_other_shapes_and_whole_numbers(key, value, words):
    state = {**classifier().state_dict(), key: value}
    assert words in refused_both_ways(normalise_names(state, source="x"), classifier())


def test_class_matrix_of_no_shape():
    state = {**classifier().state_dict(), "desc_cls.weight": torch.tensor(1.0)}
    model = classifier(1)
    assert "desc_cls.weight [] (here [7, 5])" in refusal(
        lambda: load_strict(model, state, source="weights.pyth"), model
    )
    notes = load_initial(model, state, source="x")
    assert notes[1] == "x: left aside: desc_cls.weight (1 tensor)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["fc.weight", "globalmodel.s2.b1.bn.running_var", "desc_cls.weight"])
def test_values_that_are_not_finite(tmp_path, key, value):
    state = {k: v.clone() for k, v in classifier().state_dict().items()}
    state[key].view(-1)[-1] = value
    path = save(tmp_path, published(state))
    model = classifier(1)
    for load in (load_strict, load_initial):
        message = refusal(lambda load=load: load(model, read_state(path), source=str(path)), model)
        assert message == f"{path}: {key} holds values that are not finite"


# ------------------------------------------------------------------------------------------- files that are no weights


def test_no_file(tmp_path):
    path = tmp_path / "weights.pyth"
    assert refusal(lambda: read_state(path)) == f"{path}: no such weight file"
    path.mkdir()
    assert refusal(lambda: read_state(path)) == f"{path}: no such weight file"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"path label\n" * 300, b"\x80\x04", b"PK\x03\x04", b"\xff\xd8\xff\xe0" * 99]
)
def test_other_files(tmp_path, content):
    path = tmp_path / "weights.pyth"
    path.write_bytes(content)
    assert re.match(rf"{re.escape(str(path))}: not a (readable )?weight file", refusal(lambda: read_state(path)))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle(tmp_path, protocol):
    path = tmp_path / "weights.pyth"
    path.write_bytes(pickle.dumps({"imlist": ["a"], "gnd": [{"bbx": [1.0, 2.0]}]}, protocol=protocol))
    assert "weight file" in refusal(lambda: read_state(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_file_cut_short_anywhere(tmp_path, legacy):
    content = io.BytesIO()
    torch.save(published({"fc.weight": torch.randn(8, 4)}), content, _use_new_zipfile_serialization=not legacy)
    whole = content.getvalue()
    path = tmp_path / "weights.pyth"
    path.write_bytes(whole)
    read_state(path)
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        assert "weight file" in refusal(lambda: read_state(path)), length


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_file_gives_weights_or_one_line(tmp_path, legacy):
    content = io.BytesIO()
    torch.save(published({"fc.weight": torch.randn(8, 4)}), content, _use_new_zipfile_serialization=not legacy)
    rng = random.Random(0)
    path = tmp_path / "weights.pyth"
    refused = 0
    for _ in range(200):
        damaged = bytearray(content.getvalue())
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert read_state(path)
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, "weights", None])
def test_no_mapping(tmp_path, content):
    path = save(tmp_path, content)
    assert refusal(lambda: read_state(path)) == f"{path}: holds a {type(content).__name__}, not a state dict"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model_state": {}},
        {"model_state": None, "epoch": 3},
        {"model_state": [1, 2]},
        {"fc.weight": torch.ones(2), "epoch": 3},
        {0: torch.ones(2)},
    ],
)
def test_no_state_dict(tmp_path, content):
    path = save(tmp_path, content)
    assert refusal(lambda: read_state(path)) == f"{path}: holds no model_state and is no state dict itself"


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "inside"])
def test_a_payload_is_not_executed(tmp_path, form):
    trace, path = tmp_path / "executed", tmp_path / "weights.pyth"
    content = (
        published({"fc.weight": torch.ones(2)}) | {"extra": Payload(trace)} if form == "inside" else Payload(trace)
    )
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        save(tmp_path, content, legacy=form == "legacy")
    assert "weight file" in refusal(lambda: read_checkpoint(path))
    assert not trace.exists()
    # The payload is live: whoever loads this file without care executes it.
    if form == "pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        loaded = torch.load(path, weights_only=False)
        (loaded["extra"] if form == "inside" else loaded).close()
    assert trace.exists()


@pytest.mark.parametrize("value", [np.str_("a"), np.ones(3), np.array(["a"], dtype=object)])
def test_numpy_content(tmp_path, value):
    path = save(tmp_path, published({"fc.weight": torch.ones(2)}) | {"best": value})
    assert re.match(
        rf"{path}: not a weight file, or one that holds more than tensors and plain values \(numpy\.\S+\)",
        refusal(lambda: read_state(path)),
    )


# ------------------------------------------------------------------------------- damage, bombs and files of other kinds


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    """`torch.load` reads all of these without a word."""
    path = save(tmp_path, published(descriptor().state_dict()))
    data, chance = path.read_bytes(), random.Random(1)
    with zipfile.ZipFile(path) as archive:
        parts = [entry for entry in archive.infolist() if re.search(r"/data/\d+$", entry.filename) and entry.file_size]
    for entry in chance.sample(parts, 20):
        start = entry.header_offset + 30 + int.from_bytes(data[entry.header_offset + 26 :][:2], "little")
        start += int.from_bytes(data[entry.header_offset + 28 :][:2], "little")
        place = start + chance.randrange(entry.file_size)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        torch.load(path, weights_only=True)
        assert f"Bad CRC-32 for file '{entry.filename}'" in refusal(lambda: read_state(path))


def archive(path: Path, pickled: bytes, **parts: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **parts}.items():
            file.writestr(f"a/{name}", data)
    return path


def tensor_pickle(*, numel: int, size: tuple, stride: tuple, offset: int = 0, key: str = "fc.weight") -> bytes:
    """`{key: tensor}` with the numbers as they are given."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little")

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    place = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + number(offset) + sizes + b"\x89}tR"
    return b"\x80\x02}" + text(key) + tensor + b"s."


MANY = 2**40


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"numel": MANY, "size": (MANY,), "stride": (1,)}, "its tensors have more data than the file"),
        ({"numel": 5, "size": (5,), "stride": (1,)}, "absent or of another size"),
        ({"numel": 4, "size": (5,), "stride": (1,)}, "more elements than its data"),
        ({"numel": 4, "size": (2, 2), "stride": (1, MANY)}, "more elements than its data"),
        ({"numel": 4, "size": (2, 2), "stride": (2, 1), "offset": 1}, "more elements than its data"),
        ({"numel": 4, "size": (MANY, MANY), "stride": (0, 0)}, "more elements than its data"),
        ({"numel": 4, "size": (2,) * 20, "stride": (0,) * 20}, "a size that cannot be"),
    ],
)
def test_tensors_that_declare_more_than_there_is(tmp_path, tensor, words):
    path = archive(tmp_path / "weights.pyth", tensor_pickle(**tensor), **{"data/0": bytes(16)})
    assert words in refusal(lambda: read_state(path))


def test_views_of_any_size_are_refused_by_their_names_and_shapes_before_anything_is_computed(tmp_path):
    """Of 16 bytes; whoever looks at the values first takes 4 TB."""
    for key, words in (("fc.weight", "MODEL.HEADS.REDUCTION_DIM 1073741824"), ("x", "unknown x (1 tensor)")):
        content = tensor_pickle(numel=4, size=(2**30, 2**30), stride=(0, 0), key=key)
        path = archive(tmp_path / "weights.pyth", content, **{"data/0": bytes(16)})
        huge = read_state(path)
        state = {**classifier().state_dict(), **huge}
        assert words in refused_both_ways(state, classifier())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_overflow_float32_are_refused(dtype):
    state = {**classifier().state_dict(), "fc.bias": torch.tensor([1, 2, 3e38, 4, 5], dtype=dtype)}
    assert load_strict(classifier(1), state, source="x") == []
    if dtype == torch.float64:
        state["fc.bias"][2] = 1e300
        message = refused_both_ways(state, classifier(1))
        assert message == "weights.pyth: fc.bias holds values too large for torch.float32"


def nested(opcode: bytes, depth: int) -> bytes:
    return b"\x80\x02}" + b")" + opcode * depth + b"K\x01s."


# Forty lists, each of which holds the one before it twice.
DOUBLED = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (nested(b"\x85", 300_000), "a key that is neither text nor a whole number"),  # SIGSEGV in torch's reader
        (b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 5000 + b"a" * 4999 + b"s.", "nested more than 50 deep"),
        (b"\x80\x02]q\x00" + b"h\x00a" + b".", "nested more than 50 deep"),  # a list that holds itself
        (b"\x80\x02](]q\x00" + DOUBLED + b"e.", "more than 4,000,000"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not a weight file"),  # 2 GB of a number
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "more than 64 bits"),
        (b"\x80\x02N" + b"0N" * 10 + b".", "an opcode that no weight file has (POP)"),
        (b"\x80\x02N" + b"r\xff\xff\xff\xff" * 9 + b"2.", "opcode"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "bytes are written wrongly"),
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "(__builtin__.bytearray)"),
        (b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "(torch.Tensor)"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.", "(os.system)"),
        (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "text that is no Unicode"),
    ],
)
def test_pickles_that_would_crash_or_fill_the_memory(tmp_path, pickled, words):
    path = archive(tmp_path / "weights.pyth", pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refusal(lambda: read_state(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_archives_that_torch_does_not_write(tmp_path):
    path = save(tmp_path, published(descriptor().state_dict()))
    with zipfile.ZipFile(path) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    expected = {"deflated": "compressed or encrypted", "twice": "more than one file", "bare": "did not write"}
    for mode, words in expected.items():
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
            warnings.simplefilter("ignore")
            for name, data in parts.items():
                if mode != "bare" or not name.endswith("data.pkl"):
                    file.writestr(name, data, zipfile.ZIP_DEFLATED if mode == "deflated" else zipfile.ZIP_STORED)
            if mode == "twice":
                file.writestr(next(name for name in parts if name.endswith("data.pkl")), b"\x80\x02}.")
        assert words in refusal(lambda: read_state(path))


SAFETENSORS = b'\x38\0\0\0\0\0\0\0{"fc.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}' + bytes(24)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (bytes(5000), "nothing but zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 277694709\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "a web page (HTML)"),
        (b"<html>", "a web page (HTML)"),
        (SAFETENSORS, "a safetensors file"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"PK\x03\x04" + bytes(200), "cut short"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b'{"a": 1}', "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_files_of_other_kinds_are_told_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "weights.pyth"
    path.write_bytes(content)
    assert words in refusal(lambda: read_state(path))


def test_archives_of_other_kinds_are_told_for_what_they_are(tmp_path):
    path = tmp_path / "weights.pyth"
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    path.write_bytes((tmp_path / "arrays.npz").read_bytes())
    assert "NumPy arrays (npz)" in refusal(lambda: read_state(path))
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "arrays.npz", "weights.pth")
    assert "a tar archive" in refusal(lambda: read_state(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "a TorchScript archive" in refusal(lambda: read_state(path))


TORCHVISION = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.running_var", "fc.weight")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (dict.fromkeys(TORCHVISION, torch.ones(1)), "a ResNet of torchvision or timm"),
        ({f"module.{key}": torch.ones(1) for key in TORCHVISION}, "a ResNet of torchvision or timm"),
        ({"backbone.layer1.0.conv1.weight": torch.ones(1)}, "a ResNet of torchvision or timm"),
        ({"patch_embed.proj.weight": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(1)}, "a transformer"),
        ({"_orig_mod.fc.weight": torch.ones(1)}, "saved from a compiled network"),
        ({"module._orig_mod.fc.weight": torch.ones(1)}, "saved from a compiled network"),
        ({"s1.b1.f.se.f_ex.0.weight": torch.ones(1), "stem.conv.weight": torch.ones(1)}, "a RegNetY"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "may lie under `state_dict`"),
        ({"model": {"a": torch.ones(1)}}, "may lie under `model`"),
        ({"pytorch-lightning_version": "2.1", "state_dict": {"a": torch.ones(1)}}, "a checkpoint of Lightning"),
        ({"pytorch-lightning_version": "2.1", "hyper_parameters": Path("x")}, "(pathlib"),
        ({"fc.weight": torch.eye(2).to_sparse()}, "more than tensors and plain values (torch._utils._rebuild_sparse"),
    ],
)
def test_weights_of_other_codes_are_told_for_what_they_are(tmp_path, content, words):
    path = save(tmp_path, content)
    assert words in refusal(lambda: read_state(path))


def test_absent_counters_are_no_mistake():
    """PyTorch before 0.4.1 and many converters write none."""
    source = classifier(1, with_ma=True)
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    for load in (load_strict, load_initial):
        target = classifier(2, with_ma=True)
        assert load(target, state, source="x") == []
        assert same(source.state_dict(), target.state_dict())
    imagenet = {key: value for key, value in imagenet_state().items() if not key.endswith("num_batches_tracked")}
    assert len(load_initial(classifier(3), normalise_names(imagenet, source="x"), source="x")) == 2


def test_keys_never_break_the_line():
    state = {**classifier().state_dict(), "a\nb\x1b[2J": torch.ones(1), "c" * 10_000: torch.ones(1)}
    assert refused_both_ways(state, classifier()).isprintable()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_split_head_takes_its_rows_of_a_file_with_as_many_classes_and_no_others(rank):
    """A file with 3 classes fits the 3 rows that each of two processes holds of 6, but not the head."""

    def split(seed: int) -> Classifier:
        torch.manual_seed(seed)
        head = build_head("arcface", 5, 6, scale=30.0, margin=0.15, sharded=(rank, 2))
        return Classifier(backbone(), head, dim=5)

    model, before = split(1), split(1).desc_cls.weight
    lacking, aside = load_initial(model, classifier(2, classes=3).state_dict(), source="x")
    assert lacking == "x: not in the file, left at their initial values: desc_cls.weight (1 tensor)"
    assert aside == "x: left aside: desc_cls.weight (1 tensor), 3 classes"
    assert torch.equal(model.desc_cls.weight, before)
    assert "MODEL.NUM_CLASSES 3 (here 6)" in refusal(
        lambda: load_strict(model, classifier(2, classes=3).state_dict(), source="weights.pyth"), model
    )
    for load in (load_initial, load_strict):
        model, whole = split(1), classifier(2, classes=6).state_dict()
        assert load(model, whole, source="x") == []
        assert torch.equal(model.desc_cls.weight, whole["desc_cls.weight"][3 * rank : 3 * rank + 3])
