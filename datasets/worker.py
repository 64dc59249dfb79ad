"""What runs in the processes of `workers.py`: a parent, and the workers that it forks.

The parent is a fresh interpreter. It has one thread, so that a fork finds no lock held by another one, which in the
main process it may (https://github.com/python/cpython/issues/112275); it reads the data set once, and the workers share
its memory. PyTorch is not imported: a worker is small and starts in a fraction of a second.
"""

import ctypes
import gc
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from typing import NamedTuple, Protocol

import cv2

from datasets.batch_memory import BatchMemory, WorkerMemory
from datasets.messages import Gone, receive, send

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Loadable(Protocol):
    """A data set as workers load it: batches by lists of keys."""

    worker: WorkerMemory | None  # that of the worker which it is in

    def __getitems__(self, keys: list) -> object:
        """The batch of these keys."""

    def source(self, index: int) -> str:
        """What messages call an image."""


class Start(NamedTuple):
    """What the parent is told in the beginning, descriptors included."""

    memory: int
    workers: int
    slot: int  # bytes
    channels: list[int]  # to each worker


class Failure(NamedTuple):
    """What comes instead of a batch. `trace` is empty where the line says all."""

    line: str
    trace: str


def parent(control: int, start: int) -> None:
    """Fork the workers that the file `start` describes; end with them when the main process closes `control`.

    Each line that comes through `control` is a worker that seems to have ended, and is answered by how it did.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some who start programs leave it, no end could be told
    with socket.socket(fileno=control) as channel:
        try:
            pids = _fork_all(channel, start)
        except Exception as error:
            channel.sendall(json.dumps({"error": _reason(error)}).encode() + b"\n")
            os._exit(1)
        ended: dict[int, int] = {}
        for line in channel.makefile():
            number = int(line)
            if number not in ended:
                ended[number] = os.waitpid(pids[number], 0)[1]
            code = os.waitstatus_to_exitcode(ended[number])
            channel.sendall(json.dumps({"pid": pids[number], "code": code}).encode() + b"\n")
    running = [pid for number, pid in enumerate(pids) if number not in ended]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)
    os._exit(0)


def _fork_all(control: socket.socket, start: int) -> list[int]:
    with open(start, "rb") as file:
        file.seek(0)
        told: Start = pickle.load(file)
        dataset = pickle.load(file)
    memory = BatchMemory(workers=told.workers, size=told.slot, descriptor=told.memory)
    channels = [socket.socket(fileno=descriptor) for descriptor in told.channels]
    gc.collect()
    gc.freeze()  # the collector of a worker would write to, and so copy, the memory that it shares
    pids: list[int] = []
    for number, channel in enumerate(channels):
        pid = os.fork()
        if pid == 0:
            try:
                for other in (control, *channels[number + 1 :]):
                    other.close()
                _work(channel, dataset, memory, number)
            finally:
                os._exit(1)
        pids.append(pid)
        channel.close()
    memory.close()
    return pids


def _work(channel: socket.socket, dataset: Loadable, memory: BatchMemory, number: int) -> None:
    """Answer every `(task, keys)` by `(task, batch)`, until the main process is gone."""
    if sys.platform == "linux":  # nobody else would end a worker that hangs and whose main process was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cv2.setNumThreads(0)  # one thread a worker
    _keep_memory()
    dataset.worker = WorkerMemory(memory, number)
    memory.begin(number, -1)
    try:
        while True:
            task, keys = receive(channel)
            send(channel, (task, _batch(dataset, keys)))
    except Gone:
        os._exit(0)
    except Exception as error:
        send(channel, (None, _failure(error)))


def _batch(dataset: Loadable, keys: list) -> object:
    try:
        return dataset.__getitems__(keys)
    except BaseException as error:  # SystemExit, say, would end the worker without a word
        return _failure(error)


def _failure(error: BaseException) -> Failure:
    machine = isinstance(error, MemoryError | OSError)  # it is the machine that fails, not the code
    return Failure(_reason(error), "" if machine else "".join(traceback.format_exception(error)))


def _reason(error: BaseException) -> str:
    line = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, AttributeError) and "__main__" in line:  # pickle's: workers do not run the script again
        return f"{line}; what they are given must be defined in a module, not in the script that is run"
    return line


def _keep_memory() -> None:
    # glibc gives the memory of every large array back to the kernel when it is freed, and the next one costs a fault
    # and a cleared page for each 4 KiB: more time than all arithmetic of a sample. 32 MiB is the most it allows.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
