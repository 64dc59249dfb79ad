"""What every command shares: one-line errors, files that are whole or absent, and the version of the code."""

import dis
import functools
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from core.base.door import missing_package
from core.base.terminal import BROKEN_PIPE_EXIT_CODE, STDOUT, one_line, safe_streams, unwritten

ROOT = Path(__file__).resolve().parents[2]
USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1


class Failure(RuntimeError):
    """What neither the code nor the user's settings are to blame for: one line and exit code 1."""


def is_user_error(error: BaseException) -> bool:
    """Tell a mistake of the user from a defect of the code.

    Our code raises `ValueError` for the user's mistakes and for nothing else. The same type from a library (a shape
    that does not fit, say) is a defect, and its traceback must not be lost. A library written in C leaves no frame in
    the traceback, and the innermost one is then ours all the same: it counts only if a `raise` stands there.
    """
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    path = Path(code.co_filename).resolve()  # the repository may be reached by a link
    ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    return ours and code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def ending(error: Exception) -> tuple[int, str] | None:
    """Exit code and line of an error that needs no traceback; None for a defect of the code."""
    if is_user_error(error):
        return USER_ERROR_EXIT_CODE, str(error)
    if isinstance(error, OSError) and error.filename is not None:  # a folder that cannot be written, a full disk
        return USER_ERROR_EXIT_CODE, f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError) and (missing := missing_package(error)):
        return USER_ERROR_EXIT_CODE, missing
    if isinstance(error, FloatingPointError | Failure):  # a loss that is not finite, a process that does not answer
        return FAILURE_EXIT_CODE, str(error)
    if isinstance(error, ChildProcessError) and error.errno is None:  # a loader worker that was killed, say
        return FAILURE_EXIT_CODE, str(error)
    return None


def entry_point(main: Callable) -> Callable:
    """Decorate a command's `main`: a user's mistake becomes one line on stderr and exit code 2.

    So does a file that the system refuses to read or write. A loss that is not finite and a killed loader worker give
    one line and code 1. A stdout that takes no more stops no work; then a reader that is gone (`| head -1`) gives 141.
    Ctrl-C gives 130 and SIGTERM 143, both after cleaning up. Nothing printed holds a control sequence.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles signals nowhere else
        before = signal.getsignal(signal.SIGTERM)
        if in_main_thread:
            exit_on_signals(signal.SIGTERM)
        try:
            with safe_streams():
                return _run(functools.partial(main, *args, **kwargs))
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, before)

    return wrapper


def _run(main: Callable) -> object:
    """`main()`, whatever it raises turned into the end of this process where no traceback is needed."""
    try:
        result = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        expected = ending(error)
        if expected is None:
            raise
        code, line = expected
        print(f"error: {one_line(line)}", file=sys.stderr)
        sys.exit(code)
    if (stdout := unwritten()) is not None:
        if isinstance(stdout.failure, BrokenPipeError):
            sys.exit(BROKEN_PIPE_EXIT_CODE)
        print(f"error: {STDOUT}: {stdout.reason}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    return result


def exit_on_signals(*numbers: int) -> None:
    """Let a signal (SIGINT and SIGTERM where none is named) end this process by SystemExit, code 128 + its number.

    So that what has been begun is cleaned up. Those that follow are ignored: a terminal and a parent may both send it.
    """
    numbers = numbers or (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
