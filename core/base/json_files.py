"""JSON that others may have written, read within bounds."""

import json
import math
import os
import stat
from pathlib import Path

from core.base.errors import UserError
from core.base.files import atomic_write
from core.base.terminal import reason_of

MOST_BYTES = 2**30
MOST_DEPTH = 16


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file. Raises `UserError` for another kind or more bytes, `OSError` as opening does."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # or a pipe hangs
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a regular file")
        if status.st_size > most:
            raise UserError(f"{status.st_size} bytes, more than {most}")
        return file.read()


def parse(data: bytes) -> object:
    """A value of JSON whose numbers are finite and fit 64 bits, whose texts are UTF-8, and that nests 16 deep at most.

    Raises `UserError` for anything else.
    """
    try:
        value = json.loads(data.decode())
        _check(value)
    except RecursionError:
        raise UserError("nested too deeply") from None
    except (json.JSONDecodeError, UnicodeError) as error:
        raise UserError(reason_of(error)) from None
    return value


def _check(value: object) -> None:
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > MOST_DEPTH:
            raise UserError("nested too deeply")
        inner: list = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # UnicodeEncodeError, a ValueError, for half of a pair of surrogates
            elif isinstance(item, float) and not math.isfinite(item):
                raise UserError("a number that is not finite")
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise UserError("a number of more than 64 bits")
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
        level = inner


def write_json(path: str | os.PathLike, record: object, *, sort_keys: bool = False) -> None:
    """Write a file of JSON, by `atomic_write`. Raises ValueError for numbers that are not finite, a defect of ours."""
    content = json.dumps(record, indent=1, sort_keys=sort_keys, allow_nan=False)
    with atomic_write(path) as file:
        file.write(content.encode() + b"\n")
