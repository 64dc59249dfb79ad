"""What a checkpoint of a run must hold, looked at before anything is restored from it."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from core.base.errors import UserError

MOST = 2**53  # of whole numbers: beyond any run, and exact wherever they are computed with
PARTS = {"model_state": dict, "optimizer_state": dict}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def check_content(content: dict, path: Path) -> dict:
    """Return the `run` part of a checkpoint, empty where there is none, as in those of the published code.

    Raises `UserError` naming the file and the key that is missing or holds something else.
    """
    lacking = [key for key, kind in PARTS.items() if not isinstance(content.get(key), kind)]
    lacking += [key for key in ("epoch",) if not _count(content.get(key), least=-1)]
    if lacking:
        raise UserError(f"{path}: no checkpoint of a training run, it lacks {', '.join(sorted(lacking))}")
    run = content.get("run", {})
    if not isinstance(run, dict):
        raise UserError(f"{path}: run holds a {type(run).__name__} instead of the state of a run")
    checks = [(content, "", TOP), (run, "run: ", RUN)]
    for values, prefix, table in checks:
        for key, (fits, words) in table.items():
            if key in values and not fits(values[key]):
                raise UserError(f"{path}: {prefix}{key} is not {words}: the file is damaged")
    return run


def _count(value: object, *, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _number(value: object) -> bool:
    """Infinite ones included."""
    return (isinstance(value, float) and not math.isnan(value)) or _count(value, least=-MOST)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _digests(value: object) -> bool:
    """Name -> sha256, in hexadecimal digits."""
    return isinstance(value, dict) and all(isinstance(v, str) and re.fullmatch("[0-9a-f]*", v) for v in value.values())


def _sums(value: object) -> bool:
    """Of each process: two lists of three sums and how many images they are of."""
    return isinstance(value, list) and all(
        isinstance(process, list)
        and len(process) == 2
        and all(
            isinstance(sums, list)
            and len(sums) == 4
            and all(_number(each) and abs(each) < math.inf for each in sums)
            and 0 <= sums[3] <= MOST
            for sums in process
        )
        for process in value
    )


def _scaler(value: object) -> bool:
    """GradScaler's state, or nothing."""
    if not isinstance(value, dict) or not value:
        return value == {}
    return set(value) == set(SCALER) and all(_number(each) and 0 <= each < math.inf for each in value.values())


Check = tuple[Callable[[object], bool], str]
TOP: dict[str, Check] = {
    "iteration": (_count, "a number of iterations"),
    "ema_state": (lambda value: isinstance(value, dict), "a moving average of the weights"),
}
RUN: dict[str, Check] = {
    "batch_size": (lambda value: _count(value, least=1), "a number of images"),
    "seed": (_count, "a whole number"),
    "lowest_error": (_number, "a number"),
    "best_score": (_number, "a number"),
    "broken": (_texts, "a list of messages"),
    "sums": (_sums, "the sums of each process"),
    "lists": (_digests, "the digests of the lists"),
    "scaler": (_scaler, "the state of a loss scaler"),
}
