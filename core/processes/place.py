"""Which process of a run this is: what torchrun, or a line of srun, says in the environment. Needs no PyTorch."""

import os
import re
from typing import NamedTuple

from core.base.errors import UserError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Place(NamedTuple):
    """Process `rank` of `world`, number `local_rank` on this machine, which has `local_world` (None: not said)."""

    rank: int
    world: int
    local_rank: int
    local_world: int | None = None


def place() -> Place | None:
    """This process's place in a run whose processes are started from outside; None if it was started by itself.

    Raises `UserError` naming the variable that is missing or makes no sense: half a place would train alone.
    """
    given = {name: whole_number(name) for name in NUMBERS if os.environ.get(name)}
    if not under_agent():
        alone = given.get("WORLD_SIZE", 1) == 1 and not given.get("RANK") and not given.get("LOCAL_RANK")
        if alone and len(given) < len(NUMBERS):
            return None
    if missing := [name for name in NUMBERS if name not in given]:
        there = ", ".join(given) or "TORCHELASTIC_RUN_ID"
        raise UserError(
            f"the environment has {there} but not {', '.join(missing)}: a process of a run needs RANK, WORLD_SIZE and "
            f"LOCAL_RANK (torchrun sets them); to start a run by itself unset {there}"
        )
    rank, world, local_rank = (given[name] for name in NUMBERS)
    local_world = whole_number("LOCAL_WORLD_SIZE") if os.environ.get("LOCAL_WORLD_SIZE") else None
    for name, number, limit_name, limit in (
        ("RANK", rank, "WORLD_SIZE", world),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world or world),
    ):
        if number >= limit:
            raise UserError(f"the environment's {name} is {number}: it must be below {limit_name}, which is {limit}")
    if local_world is not None and not 0 < local_world <= world:
        raise UserError(f"the environment's LOCAL_WORLD_SIZE is {local_world}, with WORLD_SIZE {world}")
    return Place(rank, world, local_rank, local_world)


def under_agent() -> bool:
    """Whether torchrun started this process, and would start it again after a failure."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))


def whole_number(name: str, *, least: int = 0, most: int = 10**6) -> int:
    """A variable of the environment. Raises `UserError` naming it."""
    text = os.environ.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(f"the environment's {name} is {text[:40]!r}, it takes a whole number from {least} to {most}")
    return int(text)


def check_threads() -> None:
    """Raise `UserError` for an OMP_NUM_THREADS that OpenMP would leave out of account."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    if text and not re.fullmatch(r" *0*[1-9][0-9]{0,5} *(, *0*[1-9][0-9]{0,5} *)*", text):
        raise UserError(f"the environment's OMP_NUM_THREADS is {text[:40]!r}, it takes a whole number from 1 up")


def device_index(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs a process takes: its own number's, or the only one that was made visible to it."""
    if visible != 1 and local_rank >= visible:
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {visible} can be used here; start fewer processes, or "
            "let each see one GPU of its own"
        )
    return 0 if visible == 1 else local_rank
