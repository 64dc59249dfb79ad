"""Timing two ways of doing one thing side by side in one process: medians, ratios, machine and versions."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from core.environment import code_version, write_json


@dataclass(frozen=True)
class Case:
    """Seconds (medians) of ours and of the baseline for one size of the problem."""

    case: str
    ours: float
    baseline: float
    runs: int
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.baseline / self.ours


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
    return Case(case, *map(statistics.median, times), runs=len(times[0]), note=note)


def _timed(side: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    side()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(name: str, mode: str, cases: Iterable[Case], *, path: Path | None = None) -> str:
    """The result as text; also as JSON in `path`. The ratio of the whole is the smallest of its cases."""
    cases = list(cases)
    worst = min(cases, key=lambda case: case.ratio)
    record = {
        "name": name,
        "mode": mode,
        "ratio": worst.ratio,
        "ours": worst.ours,
        "baseline": worst.baseline,
        "cases": [{**asdict(case), "ratio": case.ratio} for case in cases],
        "machine": machine(),
        "versions": versions(),
    }
    if path is not None:
        write_json(path, record)
    lines = [f"{name}{f' ({mode})' if mode else ''}: seconds, medians of runs in turn"]
    lines += [f"  {'':<34}{'ours':>10}{'baseline':>10}{'ratio':>8}{'runs':>6}"]
    for case in cases:
        times = f"{case.ours:>10.4f}{case.baseline:>10.4f}{case.ratio:>7.2f}x{case.runs:>6}"
        lines.append(f"  {case.case:<34}{times}" + (f"   {case.note}" if case.note else ""))
    lines.append(
        f"  on {record['machine']['processor']}, {record['machine']['threads']} threads, "
        f"load {record['machine']['load']:.1f}; " + ", ".join(f"{k} {v}" for k, v in versions().items())
    )
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What it was measured on. A load above 0 before the start means that something else was running."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": gpu or _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
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
    }
