"""What every command shares: one-line errors, files that are whole or absent, and the version of the code."""

import contextlib
import dis
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

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


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears under its name complete, on the disk, or not at all.

    An `OSError` of a write (the disk is full) names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def write_json(path: str | os.PathLike, record: object, *, sort_keys: bool = False) -> None:
    """Write a file of JSON, by `atomic_write`. Raises ValueError for numbers that are not finite."""
    content = json.dumps(record, indent=1, sort_keys=sort_keys, allow_nan=False)
    with atomic_write(path) as file:
        file.write(content.encode() + b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """The first 12 digits of the commit this code stands at, and `-dirty` if tracked files differ from it.

    `unknown` where the root is no git checkout of its own, or git cannot be run. The same commit gives the same answer
    in every clone, with or without tags, and whatever GIT_DIR and the like say in the environment (inside a hook, say).
    """
    # Given explicitly, or git would take a repository that this folder only happens to lie in.
    place = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    # A checkout of another user (in a container) is no danger: its code is running already.
    settings = ["-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        described = subprocess.run(
            ["git", *place, *settings, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    commit, dash, dirty = described.partition("-")
    return commit[:12] + dash + dirty
