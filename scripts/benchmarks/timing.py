"""Timing two ways of doing one thing side by side in one process: medians, ratios, machine and versions."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from core.base.json_files import write_json
from core.base.version import code_version


@dataclass(frozen=True)
class Case:
    """Seconds of ours and of the baseline for one size of the problem, of runs in turn: a pair a place."""

    case: str
    ours: Sequence[float]
    baseline: Sequence[float]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours is, pair by pair."""
        return [baseline / ours for ours, baseline in zip(self.ours, self.baseline, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def record(self) -> dict[str, object]:
        """For JSON: medians, and all that was measured."""
        return {
            "case": self.case,
            "ours": statistics.median(self.ours),
            "baseline": statistics.median(self.baseline),
            "ratio": self.ratio,
            "pairs": len(self.ratios),
            "seconds": {"ours": list(self.ours), "baseline": list(self.baseline)},
            "note": self.note,
        }


def compare(
    case: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    seconds: float = 10.0,
    least: int = 3,
    note: str = "",
) -> Case:
    """Time both in turn, for about `seconds` and `least` times each at least, after a run of each that is not counted.

    In turn, so that whatever else the machine does meets both.
    """
    sides = (ours, baseline)
    for side in sides:
        _timed(side)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for side, taken in zip(sides, times, strict=True):
            taken.append(_timed(side))
    return Case(case, *times, note=note)


def _timed(side: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    side()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(name: str, mode: str, cases: Iterable[Case], *, before: dict[str, object], path: Path | None = None) -> str:
    """The result as text; also as JSON in `path`. `before` is what `machine` said before the first run."""
    cases = list(cases)
    worst = min(cases, key=lambda case: case.ratio).record()
    record = {
        "name": name,
        "mode": mode,
        **{key: worst[key] for key in ("ratio", "ours", "baseline")},  # the ratio of the whole is its smallest
        "cases": [case.record() for case in cases],
        "machine": before,
        "load_after": os.getloadavg()[0],
        "versions": versions(),
    }
    if path is not None:
        write_json(path, record)
    lines = [f"{name}{f' ({mode})' if mode else ''}: seconds, medians of pairs in turn (smallest..largest)"]
    lines += [f"  {'':<34}{'ours':>24}{'baseline':>24}{'ratio':>22}{'pairs':>7}"]
    for case in cases:
        times = f"{spread(case.ours, 3):>24}{spread(case.baseline, 3):>24}{spread(case.ratios, 2):>22}"
        lines.append(f"  {case.case:<34}{times}{len(case.ratios):>7}" + (f"   {case.note}" if case.note else ""))
    return "\n".join([*lines, *conditions(record)])


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def conditions(record: dict) -> list[str]:
    """Where and with what a result was measured."""
    machine = record["machine"]
    return [
        "  on {processor} ({instructions}), {cores} cores, {threads} threads, OMP_WAIT_POLICY {omp_wait_policy}; "
        "load {load:.2f} before, ".format(**machine)
        + f"{record['load_after']:.2f} after",
        "  " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]


def machine() -> dict[str, object]:
    """What is measured on. To be read before: a load above 0 then means that something else is running."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": gpu or _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # NumPy's sort is three times faster with AVX512
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
