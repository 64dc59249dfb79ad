"""Weight files that exist in the world, read safely and loaded without silence.

Known forms: the published and our own checkpoints (`model_state` beside epoch, optimizer and cfg), a bare state dict,
either with DDP's `module.` prefix, and the ImageNet files of pycls (a backbone without the `globalmodel.` prefix, and
a classifier `head.fc`).
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones import BACKBONES
from model.weights.reading import WeightsError, read_weight_file

DDP = "module."
BACKBONE = "globalmodel."
CLASS_HEAD = "desc_cls."
CLASS_MATRIX = "desc_cls.weight"
IMAGENET_CLASSIFIER = "head."
MOST_LISTED = 4  # keys of a message; more are named by their modules
MOST_MODULES = 10  # all that DOLG has
COUNTER = ".num_batches_tracked"  # of batch norm, which uses it only with `momentum=None`; older files have none
# Where other codes put their state dict.
ELSEWHERE = ("state_dict", "model", "model_state_dict", "module", "net", "network", "teacher", "student", "params")
OTHER_CODES = (
    (r"(^|\.)_orig_mod\.", "saved from a compiled network (keys `_orig_mod.`): save `_orig_mod.state_dict()` of it"),
    (
        r"(^|\.)layer1\.0\.conv1\.",
        "weights of a ResNet of torchvision or timm (keys layer1, ...), which is another code: "
        "ImageNet weights that fit are in pretrained/README.md",
    ),
    (r"(^|\.)embedder\.embedder\.", "weights of a ResNet of Hugging Face's transformers, which is another code"),
    (
        r"(^|\.)(patch_embed|conv_stem|cls_token|class_token|dwise|f\.se)\b",
        "weights of an EfficientNet, a RegNetY or a transformer, not of a ResNet",
    ),
)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file written by `torch.save`, whole and verified, executing nothing in it. Tensors are on the CPU."""
    content = read_weight_file(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return dict(content)


def better_state(content: Mapping, *, source: str) -> tuple[Mapping, str | None]:
    """Which of a file's two sets of weights counts: its content with that one as `model_state`, and a note about it.

    A checkpoint of ours (it has `run`) holds a moving average to be used. pycls stores the errors of both and loads the
    better; its average may never have been updated, and then is the random start.
    """
    average = content.get("ema_state")
    if average is None or "model_state" not in content:
        return content, None
    if isinstance(content.get("run"), Mapping):
        return {**content, "model_state": average}, f"{source}: the moving average of the weights is used"
    test_err, ema_err = (_error(content.get(key)) for key in ("test_err", "ema_err"))
    if ema_err < test_err:
        why = f"ema_err {ema_err:g} is below test_err {test_err:g}"
        return {**content, "model_state": average}, f"{source}: the moving average of the weights is used: {why}"
    why = f"test_err {test_err:g} is not above ema_err {ema_err:g}"
    if not {"test_err", "ema_err"} & set(content):
        why = "the file tells no errors of either (test_err, ema_err)"
    return content, f"{source}: the last weights are used, not their moving average: {why}"


def _error(value: object) -> float:
    """In percent; 100, as pycls has it, where a file does not tell."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return 100.0


def normalise_names(content: Mapping, *, source: str) -> dict[str, Tensor]:
    """A checkpoint's content -> state dict under DOLG's names. Raises `WeightsError` where that is not possible."""
    state = content.get("model_state", content)
    if not isinstance(state, Mapping) or not state or not all(_is_entry(*item) for item in state.items()):
        raise WeightsError(f"{source}: {_another_layout(content)}")
    if all(key.startswith(DDP) for key in state):
        state = {key.removeprefix(DDP): value for key, value in state.items()}
    if foreign := _another_code(state):
        raise WeightsError(f"{source}: {foreign}")
    if any(key.startswith(f"{backbone.stages[0]}.") for backbone in BACKBONES.values() for key in state):
        state = {key if key.startswith(IMAGENET_CLASSIFIER) else BACKBONE + key: v for key, v in state.items()}
    return dict(state)


def _another_layout(content: Mapping) -> str:
    what = "holds no model_state and is no state dict itself"
    if any(str(key).startswith("pytorch-lightning") for key in content):
        return f"{what}: a checkpoint of Lightning, with the names of its own code under `state_dict`"
    for key in ELSEWHERE:
        if isinstance(content.get(key), Mapping):
            return f"{what}: its weights may lie under `{key}`; save that part alone with torch.save"
    return what


def _another_code(state: Mapping[str, Tensor]) -> str | None:
    """Whose weights these are, by names that no DOLG and no backbone of pycls has."""
    for pattern, what in OTHER_CODES:
        if any(re.search(pattern, key) for key in state):
            return what
    return None


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def architecture(state: Mapping[str, Tensor]) -> dict[str, object]:
    """What keys and shapes tell of the network, named by the configuration keys that build it.

    A fact the state does not show (the fusion of a bare backbone, say) is absent.
    """
    facts = _backbone_facts(state)
    if fc := _shape(state, "fc.weight", dims=2):
        facts["MODEL.FUSION"] = "orthogonal" if "fc_t.weight" in state else "global"
        facts["MODEL.WITH_MA"] = any(key.startswith("localmodel.aspp.") for key in state)
        facts["MODEL.HEADS.REDUCTION_DIM"], facts["MODEL.HEADS.IN_FEAT"] = fc
    if fc_t := _shape(state, "fc_t.weight", dims=2):
        facts["MODEL.S3_DIM"], facts["MODEL.S4_DIM"] = fc_t
    if classes := _shape(state, CLASS_MATRIX, dims=2):
        facts["MODEL.NUM_CLASSES"] = classes[0]
    return facts


def _backbone_facts(state: Mapping[str, Tensor]) -> dict[str, object]:
    state = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)}
    for name, backbone in BACKBONES.items():
        if facts := backbone.layers().recognise(state):
            return {"MODEL.TYPE": name, **facts}
    return {}


def _shape(state: Mapping[str, Tensor], key: str, *, dims: int) -> tuple[int, ...]:
    """The shape of an entry; empty where it is absent, or not of a kind that could tell anything."""
    value = state.get(key)
    return tuple(value.shape) if value is not None and value.dim() == dims and value.numel() else ()


def load_strict(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load every parameter and buffer of `model`; return notes about what the file holds beyond them.

    Only the classification head may be left aside, and only by a model that has none.
    Raises `WeightsError` that lists what differs; the model is then unchanged.
    """
    own = _whole_state(model)
    aside = set()
    if not any(key.startswith(CLASS_HEAD) for key in own):
        aside = {key for key in state if key.startswith(CLASS_HEAD)}
    _load(model, {key: value for key, value in state.items() if key not in aside}, own, set(), source=source)
    return [f"{source}: the classification head is left aside ({_listed(aside)})"] if aside else []


def load_initial(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load initial weights for training; return notes about everything the file lacks or has too much.

    The backbone must be complete. A backbone alone (an ImageNet file, whose classifier is left aside) is enough; a
    DOLG file must be complete but for its classification head, which stays at its initial values where the file has
    none, another kind, or another number of classes.
    Raises `WeightsError` that lists what differs; the model is then unchanged.
    """
    own = _whole_state(model)
    aside = {key for key in state if key.startswith(IMAGENET_CLASSIFIER)}
    usable = {key: value for key, value in state.items() if key not in aside}
    lacking: set[str] = set()
    if all(key.startswith(BACKBONE) for key in usable):
        lacking = {key for key in own if not key.startswith(BACKBONE)}
    else:
        in_model, in_file = own.get(CLASS_MATRIX), usable.get(CLASS_MATRIX)
        if in_model is not None and (in_file is None or in_file.shape != in_model.shape):
            lacking = {key for key in own if key.startswith(CLASS_HEAD)}
            aside |= {key for key in usable if key.startswith(CLASS_HEAD)}
        else:  # the heads differ only in their buffers
            lacking = {key for key in own if key.startswith(CLASS_HEAD) and key not in usable}
            aside |= {key for key in usable if key.startswith(CLASS_HEAD) and key not in own}
    usable = {key: value for key, value in usable.items() if key not in aside}
    _load(model, usable, own, lacking, source=source)
    notes = []
    if lacking:
        notes.append(f"{source}: not in the file, left at their initial values: {_listed(lacking)}")
    if aside:
        classes = architecture(state).get("MODEL.NUM_CLASSES") if CLASS_MATRIX in aside else None
        notes.append(f"{source}: left aside: {_listed(aside)}" + (f", {classes} classes" if classes else ""))
    return notes


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in which a class matrix that is split over the processes has the shape of the whole."""
    own, head = dict(model.state_dict()), getattr(model, "desc_cls", None)
    if head is not None and len(own[CLASS_MATRIX]) != head.num_classes:
        own[CLASS_MATRIX] = own[CLASS_MATRIX].new_empty(head.num_classes, *own[CLASS_MATRIX].shape[1:], device="meta")
    return own


def _load(
    model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], lacking: Collection[str], *, source: str
) -> None:
    """Load `state`. What is `lacking`, and counters, may be absent. Raises `WeightsError` before anything changes."""
    wanted, found = architecture(own), architecture(state)
    differ = [f"{k} {found[k]} (here {wanted[k]})" for k in wanted if k in found and found[k] != wanted[k]]
    if differ:
        raise WeightsError(f"{source}: weights of another architecture: {', '.join(differ)}")
    missing = [key for key in own if key not in state and key not in lacking and not key.endswith(COUNTER)]
    surplus = [key for key in state if key not in own]
    other = [
        f"{key} {_kind(state[key])} (here {_kind(own[key])})"
        for key in own
        if key in state and _kind(state[key]) != _kind(own[key])
    ]
    problems = [f"{what} {_listed(keys)}" for what, keys in (("lacks", missing), ("unknown", surplus)) if keys]
    if other:
        problems.append(f"other shapes: {', '.join(other[:MOST_LISTED])}" + (", ..." if other[MOST_LISTED:] else ""))
    if problems:
        raise WeightsError(f"{source}: does not fit this network: {'; '.join(problems)}")
    for key, value in state.items():  # only now: shapes that fit bound the memory
        _check_finite(key, value, own[key].dtype, source)
    usable = dict(state)
    if CLASS_MATRIX in usable:
        head: Any = model.desc_cls
        usable[CLASS_MATRIX] = head.shard(usable[CLASS_MATRIX])
    model.load_state_dict({**model.state_dict(), **usable}, strict=True)


def _check_finite(key: str, value: Tensor, dtype: torch.dtype, source: str) -> None:
    if value.to(dtype).isfinite().all():
        return
    what = f"values too large for {dtype}" if value.isfinite().all() else "values that are not finite"
    raise WeightsError(f"{source}: {key} holds {what}")


def _kind(value: Tensor) -> str:
    """Shape, and whether the values are whole numbers: those are no weights, and loading would cast them silently."""
    return f"{list(value.shape)}{'' if value.is_floating_point() else ' of ' + str(value.dtype)}"


def _listed(keys: Collection[str]) -> str:
    """Few keys by their names, many by their modules (`fc`, `globalmodel.s4`), and how many there are, in one line."""
    names = sorted(keys)
    if len(names) > MOST_LISTED:
        names = sorted({module[0] for key in keys if (module := re.match(rf"({re.escape(BACKBONE)})?[^.]*", key))})
    names = [name[:100] if name.isprintable() else ascii(name)[:100] for name in names[: MOST_MODULES + 1]]
    shown = ", ".join(names[:MOST_MODULES]) + (", ..." if names[MOST_MODULES:] else "")
    return f"{shown} ({len(keys)} tensor{'s' if len(keys) != 1 else ''})"
