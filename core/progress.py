"""Progress bars: live on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from core.distributed import is_main


def progress(
    iterable: Iterable, title: str, *, unit: str, total: int | None = None, initial: int = 0, leave: bool = True
) -> tqdm:
    """Wrap `iterable` in a bar on stderr, in the first process only; `initial` of `total` are done already."""
    live = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=title,
        unit=unit,
        total=total,
        initial=initial,
        leave=leave,
        disable=not is_main(),
        mininterval=0.2 if live else 10.0,
        dynamic_ncols=live,
    )
