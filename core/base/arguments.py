"""Command lines whose errors are one line."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from core.base.terminal import one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose paths know `~`, which no shell expands in `--json=~/x`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, lambda text: Path(text).expanduser())

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)} (--help shows the usage)\n")
