"""What a command prints, kept safe: names in files a user was handed can hold anything.

A control sequence in a file's name could move the cursor, rename the window or hide what was printed before it. The two
streams are wrapped once for a whole command, so that no single `print` has to think of it.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

# C0 without tab, newline and carriage return; DEL and C1; marks that reverse the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_BREAKS = re.compile(r"[\t\r\n]+")
_TQDM_MOVES = re.compile(r"[\r\n]*(\x1b\[A)+[\r\n]*")  # how tqdm goes from one bar to another
STDOUT = "stdout"
BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE: what a shell gives for a program that the signal ended


def printable(text: str) -> str:
    """`text` with every control character as its escape, e.g. `\\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """`text` without control characters, on one line."""
    return printable(_BREAKS.sub(" ", text.strip()))


class _Printable:
    """A text stream that writes what `printable` makes of a text; an `OSError` of it has the stream's name."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        with self._named():
            self._stream.write(text if _TQDM_MOVES.fullmatch(text) else printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self._name
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Notes(_Printable):
    """Stderr: notes, bars and errors, none of which is worth the work that they tell of."""

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within, nothing printed holds a control sequence, and a character that the encoding lacks is escaped."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        sys.stdout = _safe(before[0], stack, _Printable, STDOUT)
        sys.stderr = _safe(before[1], stack, _Notes, "stderr")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _safe(stream: TextIO | None, stack: contextlib.ExitStack, kind: type[_Printable], name: str) -> Any:
    if stream is None or isinstance(stream, _Printable):  # None: the descriptor was closed before the start
        return stream
    if hasattr(stream, "reconfigure") and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
        stack.callback(_restore, stream)
    return kind(stream, name)


def _restore(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # what could not be written cannot be flushed
        stream.reconfigure(errors="strict")


def silence_stdout() -> None:
    """Point stdout at nothing, so that what it still holds does not fail again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
