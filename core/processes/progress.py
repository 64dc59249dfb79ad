"""Progress bars of a run of several processes: the first one shows them."""

from collections.abc import Iterable

from tqdm import tqdm

from core.base.progress import bar
from core.processes.distributed import is_main


def progress(
    iterable: Iterable, title: str, *, unit: str, total: int | None = None, initial: int = 0, leave: bool = True
) -> tqdm:
    """Wrap `iterable` in a bar on stderr, in the first process only; `initial` of `total` are done already."""
    return bar(iterable, title, unit=unit, total=total, initial=initial, leave=leave, disable=not is_main())
