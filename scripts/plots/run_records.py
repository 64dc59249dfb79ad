"""The curves of one training run, from the json_stats lines of its log."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.base.errors import UserError
from core.logging import JSON_PREFIX
from revisitop.protocol import SETTING_NAMES

LOG_NAME = "stdout.log"  # that of core.checkpoints.output, which needs torch; curves are drawn where there is none
KINDS = ("train_iter", "train_epoch", "test_epoch", "retrieval")  # what core.trainer logs of an epoch
LEVELS = tuple(name.lower() for name in SETTING_NAMES.values())


@dataclass
class RunCurves:
    """What a log tells of a run, by kind of record: {epoch, as a fraction: record}, epochs ascending.

    `retrieval` records have a dict of their own for every set.
    """

    file: Path
    kinds: dict[str, dict[float, dict]] = field(default_factory=dict)
    torn: int = 0  # records that could not be read

    def curve(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values, float64 [N] both; records where the value is null or absent are left out."""
        points = [(x, record[key]) for x, record in self.kinds.get(kind, {}).items() if _is_number(record.get(key))]
        return np.array([x for x, _ in points], np.float64), np.array([y for _, y in points], np.float64)

    def sets(self) -> list[str]:
        """The Revisited sets that the run was scored on."""
        return sorted(kind.removeprefix("retrieval ") for kind in self.kinds if kind.startswith("retrieval "))


def read_run(path: str | os.PathLike) -> RunCurves:
    """Read OUT_DIR/stdout.log, or the file with a run's output. Raises UserError if there is no record in it."""
    path = Path(path)
    file = path / LOG_NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such log; give the OUT_DIR of a training run, or the file with its output"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: the log cannot be read ({error.strerror})") from error
    run = RunCurves(file)
    decoder = json.JSONDecoder()
    for line in text.splitlines():
        # A run that was killed leaves half a line, to which the next one may have added its first.
        for part in line.split(JSON_PREFIX)[1:]:
            try:
                record, _ = decoder.raw_decode(part)
                _add(run.kinds, record)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                run.torn += 1
    if not any(run.kinds.values()):
        raise UserError(f"{file}: no json_stats line with an epoch in it, so nothing to draw")
    return run


def _add(kinds: dict[str, dict[float, dict]], record: dict) -> None:
    """Put a record in its place. One that is not behind the last of its kind tells of a resumed run: what was logged
    from there on belongs to weights that are gone, and is dropped."""
    kind = record["_type"]
    if kind not in KINDS:
        return
    x = position(record)
    if kind == "retrieval":
        kind = f"retrieval {record['set']}"
    records = kinds.setdefault(kind, {})
    if records and x <= next(reversed(records)):
        for name in kinds if kind == "train_iter" else [kind]:
            kinds[name] = {at: known for at, known in kinds[name].items() if at < x}
    kinds[kind][x] = record


def position(record: dict) -> float:
    """How many epochs are done: 2.25 for iteration 100/400 of epoch 3/90, 3 for what is logged at the end of it."""
    epoch = _fraction(record["epoch"])[0]
    if "iter" not in record:
        return float(epoch)
    done, iterations = _fraction(record["iter"])
    return epoch - 1 + done / iterations


def _fraction(text: str) -> tuple[int, int]:
    part, whole = map(int, text.split("/"))
    if part < 0 or whole < 1:
        raise UserError(f"{text}: expected a fraction")
    return part, whole


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def smooth(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """For every point the mean of all points within `width` / 2 of it, float64 [N]; `x` is ascending."""
    tolerance = 1e-9  # on either side, since positions are sums of fractions
    first = np.searchsorted(x, x - width / 2 - tolerance)
    last = np.searchsorted(x, x + width / 2 + tolerance)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[last] - sums[first]) / (last - first)


def run_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """What a legend calls the runs: the ends of their paths, as long as it takes to tell them apart."""
    parts = [Path(os.path.abspath(path)) for path in paths]
    parts = [path.parent if path.name == LOG_NAME else path for path in parts]
    parts = [path.with_suffix("") if path.is_file() else path for path in parts]
    length, most = 1, max(len(path.parts) for path in parts)
    while length < most and len({path.parts[-length:] for path in parts}) < len(set(parts)):
        length += 1
    return ["/".join(path.parts[-length:]) for path in parts]
