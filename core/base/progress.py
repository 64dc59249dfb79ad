"""Progress of one process: a live bar on a terminal, a line now and then in a log, or word to a parent.

Needs no PyTorch, so that a process which only starts others is there at once.
"""

import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

# The number of a pipe to a parent that shows one bar for many processes. A line is `done total`.
PROGRESS_PIPE = "DOLG_PROGRESS_PIPE"


def bar(iterable: Iterable | None, title: str, *, unit: str, **more) -> tqdm:
    """A bar on stderr, unless a parent shows one for all; `more` is tqdm's."""
    live = sys.stderr.isatty()
    more["disable"] = more.get("disable", False) or PROGRESS_PIPE in os.environ
    return tqdm(iterable, desc=title, unit=unit, mininterval=0.2 if live else 10.0, dynamic_ncols=live, **more)


class Counter:
    """Counts what is done of `total`: on a bar of its own, or to the parent if that has opened a pipe for it."""

    def __init__(self, title: str, *, unit: str, total: int) -> None:
        self._pipe = int(os.environ.get(PROGRESS_PIPE, "-1"))
        self._bar = bar(None, title, unit=unit, total=total, disable=total == 0) if self._pipe < 0 else None
        self._done, self._total, self._told = 0, total, 0.0

    def __enter__(self) -> "Counter":
        self._tell()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error[0] is None:
            self._tell()

    def add(self, count: int) -> None:
        """Raises `SystemExit` if the parent is gone: nobody would see or end this process."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told > 0.5:
            self._tell()

    def _tell(self) -> None:
        if self._bar is not None:
            return
        self._told = time.monotonic()
        try:
            os.write(self._pipe, b"%d %d\n" % (self._done, self._total))
        except BrokenPipeError:
            sys.exit("the process that started this one is gone")
