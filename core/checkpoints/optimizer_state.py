"""The optimiser's state as a checkpoint holds it, and back: by the names of the parameters, whatever their numbers."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from core.base.errors import UserError

# What an optimiser keeps for each parameter, in its shape. AdamW counts the steps beside it.
KEPT = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
MOST_STEPS = 2**24  # float32 counts no further
MOST_LISTED = 3


class StateError(UserError):
    """An optimizer state that cannot be used; the message is one line that begins with the key."""


class Head(Protocol):
    """The head of a network, whose classes may be split over the processes."""

    weight: nn.Parameter
    num_classes: int

    def gather(self, rows: Tensor) -> Tensor | None: ...

    def shard(self, full: Tensor) -> Tensor: ...


def whole_state(optimizer: Optimizer, head: Head | None) -> dict:
    """`optimizer.state_dict()`, with all classes of a sharded `head`; a collective call, complete in the first process.

    The optimizer stays as it is: torch hands out the very dictionaries that it works with.
    """
    content = optimizer.state_dict()
    state = {number: dict(entry) for number, entry in sorted(content["state"].items())}
    if head is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        entry = next((state.get(number, {}) for number, p in enumerate(parameters) if p is head.weight), {})
        for name, value in sorted(entry.items()):
            if isinstance(value, Tensor) and value.shape == head.weight.shape:
                entry[name] = head.gather(value)
    return {"state": state, "param_groups": content["param_groups"]}


def load_state(
    optimizer: Optimizer, content: Mapping, head: Head | None, *, numbering: Callable[[], list[list[str]]]
) -> list[str]:
    """Take up the state of every parameter that is trained; return notes about those for which `content` has none.

    Rates, decay and the like stay as they are. A state that does not name its parameters (the published code's) numbers
    them: `numbering()` gives their names, group by group. Raises `StateError`; nothing is then changed.
    """
    saved = _by_name(content, numbering)
    kind = "sgd" if isinstance(optimizer, SGD) else "adamw"
    kinds = {k for k, kept in KEPT.items() for entry in saved.values() if not entry.keys().isdisjoint(kept)}
    if len(kinds) > 1:
        raise StateError("state mixes that of SGD and that of AdamW")
    if kinds and kinds != {kind}:
        return [f"OPTIM.OPTIMIZER was {kinds.pop()}: {kind} begins without what that had gathered"]
    loaded, without = {}, []
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name not in saved:
                without.append(name)
                continue
            part = head if head is not None and parameter is head.weight else None
            loaded[parameter] = _entry(saved[name], parameter, kind, part, key=f"state of {name}")
    if not any(group.get("momentum", 1.0) for group in optimizer.param_groups):
        return []
    optimizer.state.update(loaded)
    return [f"no optimizer state for {_listed(without)}: it begins at zero there"] if without else []


def _by_name(content: Mapping, numbering: Callable[[], list[list[str]]]) -> dict[str, Mapping]:
    """What there is for each parameter that has anything."""
    state, groups = content.get("state"), content.get("param_groups")
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise StateError("state is no table of what was kept for each parameter")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise StateError("param_groups is no list of groups")
    groups = [group for group in groups if group.get("params") != []]  # earlier versions kept empty ones
    numbers = [group.get("params") for group in groups]
    if not all(isinstance(n, list) and all(isinstance(number, int) for number in n) for n in numbers):
        raise StateError("param_groups: params is no list of numbers")
    named = [group["param_names"] for group in groups if "param_names" in group]
    names = named if len(named) == len(groups) else numbering()
    if not all(isinstance(n, list) and all(isinstance(name, str) for name in n) for n in names):
        raise StateError("param_groups: param_names is no list of names")
    if list(map(len, names)) != list(map(len, numbers)):
        raise StateError(
            f"param_groups has groups of {list(map(len, numbers))} parameters where its settings make "
            f"{list(map(len, names))} (BN.USE_CUSTOM_WEIGHT_DECAY, OPTIM.HEAD_LR_MULT, TRAIN.FREEZE_AT, "
            "TRAIN.FREEZE_BN and MODEL.GEM.TRAINABLE decide)"
        )
    name_of = {number: name for n, m in zip(numbers, names, strict=True) for number, name in zip(n, m, strict=True)}
    if len(name_of) != sum(map(len, numbers)) or len(set(name_of.values())) != len(name_of):
        raise StateError("param_groups lists a parameter twice")
    if unknown := [number for number in state if number not in name_of]:
        raise StateError(f"state has an entry {_shown(unknown[0])} that no group lists")
    present = {number: {k: v for k, v in entry.items() if v is not None} for number, entry in state.items()}
    return {name_of[number]: entry for number, entry in present.items() if entry}


def _entry(saved: Mapping, parameter: nn.Parameter, kind: str, head: Head | None, *, key: str) -> dict[str, Tensor]:
    """The state of one parameter, of this process's classes where the parameter is that of a `head`."""
    expected = {*KEPT[kind], "step"} if kind == "adamw" else set(KEPT[kind])
    if saved.keys() != expected:
        raise StateError(f"{key} holds {', '.join(map(_shown, saved))} instead of {', '.join(sorted(expected))}")
    whole = parameter.shape if head is None else (head.num_classes, *parameter.shape[1:])
    entry = {}
    for name in KEPT[kind]:
        value = _checked(saved[name], whole, parameter.dtype, key=f"{key}: {name}")
        if name == "exp_avg_sq" and (value < 0).any():
            raise StateError(f"{key}: {name} holds negative values, which no mean of squares has")
        # The fused kernels walk through memory, so that the state must lie there as the parameter does.
        entry[name] = torch.empty_like(parameter).copy_(value if head is None else head.shard(value))
    if kind == "adamw":
        entry["step"] = torch.tensor(_steps(saved["step"], key), dtype=torch.float32, device=parameter.device)
    return entry


def _checked(value: object, shape: tuple[int, ...], dtype: torch.dtype, *, key: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise StateError(f"{key} is no tensor of floating-point numbers")
    if value.shape != shape:
        raise StateError(f"{key} is {list(value.shape)}, the parameter {list(shape)}")
    value = value.to(dtype)
    if not value.isfinite().all():
        raise StateError(f"{key} holds values that are not finite")
    return value


def _steps(value: object, key: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and value.layout == torch.strided and not value.is_meta:
        counts = value.is_floating_point() or value.dtype in (torch.int32, torch.int64)
        value = value.double().item() if counts else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_STEPS:
        raise StateError(f"{key}: step is no number of steps")
    return float(value)


def _shown(key: object) -> str:
    """A key of a file, which may be anything."""
    return f"{key:.40}" if isinstance(key, str) else f"of type {type(key).__name__}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
