"""How a command ends: in one line where the user is to blame, or the machine; in a traceback where the code is."""

import functools
import signal
import sys
import threading
from collections.abc import Callable

from core.base.door import missing_package
from core.base.terminal import BROKEN_PIPE_EXIT_CODE, STDOUT, one_line, safe_streams, unwritten

USER_ERROR_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1


class UserError(ValueError):
    """A mistake of the user, in one line that names the file, key or line number and the mend.

    A leaf marks its own error in the same way, since it does not know this one: a class attribute `is_user_error`.
    A `ValueError` without the mark is a defect of the code or of a library, and its traceback is shown.
    """

    is_user_error = True


class Failure(RuntimeError):
    """What neither the code nor the user's settings are to blame for: one line and exit code 1."""


def is_user_error(error: BaseException) -> bool:
    return getattr(error, "is_user_error", False)


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
