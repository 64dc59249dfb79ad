"""What a command prints, kept safe: names in files a user was handed can hold anything.

A control sequence in a file's name could move the cursor, rename the window or hide what was printed before it. The two
streams are wrapped once for a whole command, so that no single `print` has to think of it.
"""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

# C0 without tab, newline and carriage return; DEL and C1; marks that reverse the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_BREAKS = re.compile(r"[\t\r\n]+")
_TQDM_MOVES = re.compile(r"[\r\n]*(\x1b\[A)+[\r\n]*")  # how tqdm goes from one bar to another
STDOUT = "stdout"
LONGEST_LINE = 1500  # characters; a value or a name that a message quotes can have any length
BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE: what a shell gives for a program that the signal ended


def printable(text: str) -> str:
    """`text` with every control character as its escape, e.g. `\\x1b`."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """`text` without control characters, on one line that can still be read."""
    line = printable(_BREAKS.sub(" ", text.strip()))
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def reason_of(error: BaseException | str) -> str:
    """What an exception says, on one line of at most 300 characters; its type where it says nothing."""
    return one_line(str(error))[:300] or type(error).__name__


class _Printable:
    """A text stream that writes what `printable` makes of a text. What it cannot write is left out: `failure` is why.

    `tell` is told of the first failure, in one line.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream, self._name = stream or _Closed(), name
        self.failure: Exception | None = None
        self.tell: Callable[[str], None] | None = None

    def write(self, text: str) -> int:
        with self._going_on():
            self._stream.write(text if _TQDM_MOVES.fullmatch(text) else printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._going_on():
            self._stream.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        # a full disk, a reader that is gone; a closed stream; a signal's handler that prints while a print is under way
        except (OSError, ValueError, RuntimeError) as error:
            if self.failure is None:
                self.failure = error
                if self.tell is not None:
                    self.tell(f"{self._name} cannot be written ({self.reason}); what it does not take is left out")

    def leave(self) -> None:
        """Flush; point a descriptor that failed at nothing, or it would fail again when the interpreter ends."""
        self.flush()
        if self.failure is not None:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    @property
    def reason(self) -> str:
        return getattr(self.failure, "strerror", None) or str(self.failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Closed(io.TextIOBase):
    """Stands for a stream whose descriptor was closed before the start (`>&-`)."""

    encoding, errors = "utf-8", "backslashreplace"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within, nothing printed holds a control sequence, and a character that the encoding lacks is escaped.

    A write that fails raises nothing: a command does its work and writes its files; `unwritten` says at its end what
    became of stdout.
    """
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        sys.stdout = _safe(before[0], stack, STDOUT)
        sys.stderr = _safe(before[1], stack, "stderr")
        wrapped = sys.stdout, sys.stderr
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in set(wrapped) - set(before):
                stream.leave()


def _fill_closed_descriptors() -> None:
    """A file opened later must not get the number of a stream that was closed: a checkpoint would be stdout's."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the smallest free number: this one


def _safe(stream: TextIO | None, stack: contextlib.ExitStack, name: str) -> _Printable:
    if isinstance(stream, _Printable):
        return stream
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
        stack.callback(_restore, stream)
    return _Printable(stream, name)


def work_goes_on(tell: Callable[[str], None] = lambda text: print(f"note: {text}", file=sys.stderr)) -> None:
    """For a command whose files are what counts: a stream that cannot be written is told of once and changes nothing,
    not even the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Printable):
            stream.tell = tell


def unwritten() -> _Printable | None:
    """The stdout of `safe_streams` if it could not be written and that has not been told."""
    sys.stdout.flush()
    failed = isinstance(sys.stdout, _Printable) and sys.stdout.failure is not None
    return sys.stdout if failed and sys.stdout.tell is None else None


def _restore(stream: io.TextIOWrapper) -> None:
    with contextlib.suppress(OSError, ValueError):  # what could not be written cannot be flushed
        stream.reconfigure(errors="strict")
