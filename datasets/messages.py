"""Messages between the main process and its loader workers, over a socket for each of them.

Nothing here uses /dev/shm, named semaphores or locks between processes: a message arrives, or the socket tells that the
other side is gone. Large arrays travel as a file of anonymous memory whose descriptor is sent along.
"""

import errno
import io
import os
import pickle
import socket
import struct
from typing import Any

import numpy as np

from datasets.batch_memory import BatchMemory, Slot, anonymous_file
from datasets.errors import DataError

LARGE = 1 << 14  # bytes; what is below fits the buffer of a socket twice, and whoever sends it need not wait
_HEAD = struct.Struct("<Q?")  # bytes of the message, and whether they are in the last of the files that come with it
_MOST_FILES = 250  # that the system sends at once
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Gone(Exception):
    """The other side has closed the socket, or ended."""


def send(channel: socket.socket, message: object) -> None:
    """Raises `Gone`."""
    files: list[int] = []
    try:
        data = _packed(message, files)
        size, in_file = len(data), len(data) >= LARGE
        if in_file:
            files.append(_filed(data))
            data = b""
        socket.send_fds(channel, [_HEAD.pack(size, in_file)], files)
        channel.sendall(data)
    except ConnectionError as error:
        raise Gone from error
    finally:
        for file in files:
            os.close(file)


def receive(channel: socket.socket, memory: BatchMemory | None = None) -> Any:
    """The next message; slots are those of `memory`. Raises `Gone`, and `OSError` where too many files are open."""
    try:
        head, files, flags, _ = socket.recv_fds(channel, _HEAD.size, _MOST_FILES + 1, _CLOSE_ON_EXEC)
        try:
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            head += _exactly(channel, _HEAD.size - len(head))
            size, in_file = _HEAD.unpack(head)
            data = _read(files[-1], np.empty(size, np.uint8).data) if in_file else _exactly(channel, size)
            return _Unpickler(data, files, memory).load()
        finally:
            for file in files:
                os.close(file)
    except ConnectionError as error:
        raise Gone from error


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise Gone
        data += part
    return data


def _packed(message: object, files: list[int]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, files).dump(message)
    return buffer.getvalue()


def _filed(data: memoryview | bytes) -> int:
    """A file of anonymous memory that holds these bytes."""
    file, rest = anonymous_file(), memoryview(data)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except BaseException:
        os.close(file)
        raise
    return file


def _read(file: int, out: memoryview) -> memoryview:
    """Fill `out`, single bytes, from the start of a file."""
    os.lseek(file, 0, os.SEEK_SET)
    rest = out
    while rest:
        rest = rest[os.readv(file, [rest]) :]
    return out


class _Pickler(pickle.Pickler):
    """Puts large arrays into files, and of what lies in a slot only the place into the message."""

    def __init__(self, buffer: io.BytesIO, files: list[int]) -> None:
        super().__init__(buffer, protocol=5)
        self._files = files

    def persistent_id(self, part: object) -> tuple | None:
        if isinstance(part, Slot):
            return "slot", part.place
        if isinstance(part, np.ndarray) and part.nbytes >= LARGE and not part.dtype.hasobject:
            if len(self._files) == _MOST_FILES:
                raise DataError(f"a message with more than {_MOST_FILES} large arrays")
            self._files.append(_filed(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data))
            return "file", (len(self._files) - 1, part.shape, part.dtype.str)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes | memoryview, files: list[int], memory: BatchMemory | None) -> None:
        super().__init__(io.BytesIO(data))
        self._files, self._memory = files, memory

    def persistent_load(self, identity: tuple) -> np.ndarray:
        kind, place = identity
        if kind == "slot":
            assert self._memory is not None, "only the main process is sent slots"
            return self._memory.arrived(*place)
        number, shape, dtype = place
        array = np.empty(shape, dtype)
        _read(self._files[number], array.reshape(-1).view(np.uint8).data)
        return array
