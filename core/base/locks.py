"""One run an OUT_DIR: a lock that the operating system holds, and drops when the process ends in whatever way.

Extraction takes the same lock in its shared form: many shards write into a folder, and whoever joins their work needs
it alone.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from core.base.errors import UserError

# What file systems without locks answer (some network ones).
UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class InUse(UserError):
    """Another process holds the lock; the message is one line."""


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike, *, shared: bool = False) -> Iterator[bool]:
    """Make `folder` if need be and lock it; yields whether its file system has locks.

    The folder itself is what is locked: no file is left over. Many processes can hold a shared lock at once. Raises
    `InUse` if another process holds it in a way that excludes this one, `UserError` if it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    descriptors = [descriptor]

    def close_in_fork() -> None:  # a loader worker that outlives its parent must not keep the lock
        while descriptors:
            os.close(descriptors.pop())

    os.register_at_fork(after_in_child=close_in_fork)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{folder} is in use by another run: wait, or name another OUT_DIR") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            yield False
        else:
            yield True
    finally:
        close_in_fork()
