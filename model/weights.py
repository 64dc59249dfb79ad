"""Weight files that exist in the world, read safely and loaded without silence.

Known forms: the published and our own checkpoints (`model_state` beside epoch, optimizer and cfg), a bare state dict,
either with DDP's `module.` prefix, and the ImageNet files of pycls (a backbone without the `globalmodel.` prefix, and
a classifier `head.fc`).
"""

import os
import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

DDP = "module."
BACKBONE = "globalmodel."
CLASS_HEAD = "desc_cls."
CLASS_MATRIX = "desc_cls.weight"
IMAGENET_CLASSIFIER = "head."
MOST_LISTED = 4  # keys of a message; more are named by their modules
MOST_MODULES = 10  # all that DOLG has
DEPTHS = {("basic", (2, 2, 2, 2)): 18, ("basic", (3, 4, 6, 3)): 34}
DEPTHS |= {("bottleneck", b): d for d, b in {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}.items()}


class WeightsError(ValueError):
    """A weight file that cannot be used; the message is one line."""


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file written by `torch.save`, executing nothing in it. Tensors arrive on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it can be read
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: not a weight file, or one that holds more than tensors and plain values") from None
    except Exception as error:  # a damaged file makes torch raise anything, IndexError and struct.error included
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise WeightsError(f"{path}: not a readable weight file, perhaps cut short ({reason})") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return dict(content)


def normalise_names(content: Mapping, *, source: str) -> dict[str, Tensor]:
    """A checkpoint's content -> state dict under DOLG's names. Raises `WeightsError` where that is not possible."""
    state = content.get("model_state", content)
    if not isinstance(state, Mapping) or not state or not all(_is_entry(*item) for item in state.items()):
        raise WeightsError(f"{source}: holds no model_state and is no state dict itself")
    if all(key.startswith(DDP) for key in state):
        state = {key.removeprefix(DDP): value for key, value in state.items()}
    if any(key.startswith("stem.") for key in state):
        state = {key if key.startswith(IMAGENET_CLASSIFIER) else BACKBONE + key: v for key, v in state.items()}
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(f"{source}: {key} holds values that are not finite")
    return dict(state)


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def architecture(state: Mapping[str, Tensor]) -> dict[str, object]:
    """What keys and shapes tell of the network, named by the configuration keys that build it.

    A fact the state does not show (the fusion of a bare backbone, say) is absent.
    """
    blocks = [
        len({match[1] for key in state if (match := re.match(rf"globalmodel\.s{stage}\.(b\d+)\.", key))})
        for stage in (1, 2, 3, 4)
    ]
    kind = "bottleneck" if f"{BACKBONE}s1.b1.f.c.weight" in state else "basic"
    facts: dict[str, object] = {}
    if all(blocks):
        facts["MODEL.DEPTH"] = DEPTHS.get((kind, tuple(blocks)), f"unknown ({kind} blocks {blocks})")
    inner = _shape(state, f"{BACKBONE}s1.b1.f.b.weight", dims=4)
    if kind == "bottleneck" and inner:
        facts["RESNET.NUM_GROUPS"] = inner[0] // inner[1]
        facts["RESNET.WIDTH_PER_GROUP"] = inner[1]
    if fc := _shape(state, "fc.weight", dims=2):
        facts["MODEL.FUSION"] = "orthogonal" if "fc_t.weight" in state else "global"
        facts["MODEL.WITH_MA"] = any(key.startswith("localmodel.aspp.") for key in state)
        facts["MODEL.HEADS.REDUCTION_DIM"], facts["MODEL.HEADS.IN_FEAT"] = fc
    if fc_t := _shape(state, "fc_t.weight", dims=2):
        facts["MODEL.S3_DIM"], facts["MODEL.S4_DIM"] = fc_t
    if classes := _shape(state, CLASS_MATRIX, dims=2):
        facts["MODEL.NUM_CLASSES"] = classes[0]
    return facts


def _shape(state: Mapping[str, Tensor], key: str, *, dims: int) -> tuple[int, ...]:
    """The shape of an entry; empty where it is absent, or not of a kind that could tell anything."""
    value = state.get(key)
    return tuple(value.shape) if value is not None and value.dim() == dims and value.numel() else ()


def load_strict(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load every parameter and buffer of `model`; return notes about what the file holds beyond them.

    Only the classification head may be left aside, and only by a model that has none.
    Raises `WeightsError` that lists what differs; the model is then unchanged.
    """
    own = model.state_dict()
    aside = set()
    if not any(key.startswith(CLASS_HEAD) for key in own):
        aside = {key for key in state if key.startswith(CLASS_HEAD)}
    _load(model, {key: value for key, value in state.items() if key not in aside}, own, source=source)
    return [f"{source}: the classification head is left aside ({_listed(aside)})"] if aside else []


def load_initial(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load initial weights for training; return notes about everything the file lacks or has too much.

    The backbone must be complete. A backbone alone (an ImageNet file, whose classifier is left aside) is enough; a
    DOLG file must be complete but for its classification head, which stays at its initial values where the file has
    none, another kind, or another number of classes.
    Raises `WeightsError` that lists what differs; the model is then unchanged.
    """
    own = model.state_dict()
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
    _load(model, {**usable, **{key: own[key] for key in lacking}}, own, source=source)
    notes = []
    if lacking:
        notes.append(f"{source}: not in the file, left at their initial values: {_listed(lacking)}")
    if aside:
        classes = architecture(state).get("MODEL.NUM_CLASSES") if CLASS_MATRIX in aside else None
        notes.append(f"{source}: left aside: {_listed(aside)}" + (f", {classes} classes" if classes else ""))
    return notes


def _load(model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str) -> None:
    wanted, found = architecture(own), architecture(state)
    differ = [f"{k} {found[k]} (here {wanted[k]})" for k in wanted if k in found and found[k] != wanted[k]]
    if differ:
        raise WeightsError(f"{source}: weights of another architecture: {', '.join(differ)}")
    missing = [key for key in own if key not in state]
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
    model.load_state_dict(state, strict=True)


def _kind(value: Tensor) -> str:
    """Shape, and whether the values are whole numbers: those are no weights, and loading would cast them silently."""
    return f"{list(value.shape)}{'' if value.is_floating_point() else ' of ' + str(value.dtype)}"


def _listed(keys: Collection[str]) -> str:
    """Few keys by their names, many by their modules (`fc`, `globalmodel.s4`), and how many there are, in one line."""
    names = sorted(keys)
    if len(names) > MOST_LISTED:
        names = sorted({re.match(rf"({re.escape(BACKBONE)})?[^.]*", key)[0] for key in keys})
    shown = ", ".join(names[:MOST_MODULES]) + (", ..." if names[MOST_MODULES:] else "")
    return f"{shown} ({len(keys)} tensor{'s' if len(keys) != 1 else ''})"
