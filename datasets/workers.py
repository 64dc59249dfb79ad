"""Loader workers as the main process sees them: started, given tasks, watched, ended.

A worker that is killed, stopped or stuck ends the run in one line; none outlives the main process, however that ends.
"""

import contextlib
import itertools
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.batch_memory import BatchMemory, above_standard, anonymous_file
from datasets.messages import Gone, receive, send
from datasets.worker import Failure, Loadable, Start

ROOT = Path(__file__).resolve().parents[1]
AHEAD = 2  # tasks that a worker is given before the first of them is asked for
TO_START = 300.0  # seconds; NumPy and OpenCV may have to come from a network disk
TO_END = 5.0  # seconds, then what does not end is killed
_SLICE = 0.5  # seconds between two looks at workers that are waited for
_PROGRAM = """
import json, os, sys
sys.path[:] = sys.argv[3:]
try:
    from datasets.worker import parent
except BaseException as error:
    os.write(int(sys.argv[1]), json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\\n")
    os._exit(1)
parent(int(sys.argv[1]), int(sys.argv[2]))
"""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of libraries that start some when imported


class WorkerError(ChildProcessError):
    """A worker cannot go on, and so cannot the run; the message is one line."""


class Workers:
    """`count` processes that make batches of `dataset` by its `__getitems__`.

    The data set is pickled once. In a worker its attribute `worker` is the `WorkerMemory`, which has slots of `slot`
    bytes and takes note of each image that is begun. An image that takes a worker more than `limit` seconds (0: any
    time) ends the run.
    """

    def __init__(self, dataset: Loadable, *, count: int, slot: int, limit: float) -> None:
        self._dataset, self._count, self._limit = dataset, count, limit
        self._turn = 0  # of the iterations
        self._interrupted = False
        try:
            self._memory = BatchMemory(workers=count, size=slot)
            self._channels, self._control, self._parent = _start(dataset, self._memory, count)
        except OSError as error:  # too many open files, processes
            raise WorkerError(f"{count} loader workers cannot start: {error.strerror or error}") from error
        self._pending, self._begun, self._waited = [0] * count, [0] * count, [0.0] * count  # by worker
        self._control.settimeout(TO_END)
        self._selector = selectors.DefaultSelector()
        for number, channel in enumerate(self._channels):
            channel.settimeout(limit or None)
            self._selector.register(channel, selectors.EVENT_READ, number)
        # Also where they are forgotten, and at the end of the interpreter.
        parts = (self._control, self._selector, *self._channels)
        self.close = weakref.finalize(self, _end, self._parent, self._control, parts, os.getpid())

    def map(self, batches: Iterable[list]) -> Iterator[object]:
        """The batches of these lists of keys, in their order, made ahead. Raises `WorkerError`.

        It may be left anywhere for another; workers first finish the few batches that they have begun.
        """
        self._turn += 1
        made: dict[int, object] = {}
        turn, tasks, number = self._turn, enumerate(batches), 0
        handed = self._hand_out(tasks, AHEAD * self._count)
        while number < handed:
            while number not in made:
                (of_turn, arrived), of_task = self._next()
                if of_turn == turn:
                    made[arrived] = of_task
            batch = made.pop(number)
            handed += self._hand_out(tasks, 1)  # to the worker of this batch
            yield batch
            assert self._turn == turn, "another iteration has begun"
            number += 1

    def interrupt(self) -> None:
        """Let another thread that waits for workers give up soon, by `WorkerError`."""
        self._interrupted = True

    def _hand_out(self, tasks: Iterator[tuple[int, list]], most: int) -> int:
        """Hand the next tasks to the workers in turn; returns how many."""
        count = 0
        for number, keys in itertools.islice(tasks, most):
            worker = number % self._count
            try:
                send(self._channels[worker], ((self._turn, number), keys))
            except Gone:
                raise self._lost(worker) from None
            except TimeoutError:
                raise self._stuck(worker) from None
            self._pending[worker] += 1
            count += 1
        return count

    def _next(self) -> tuple[tuple[int, int], object]:
        """What the next worker has made: its task, the batch."""
        while True:
            before = time.monotonic()
            ready = self._selector.select(_SLICE)
            if self._interrupted:
                raise WorkerError("interrupted")
            if ready:
                return self._received(ready[0][0].data)
            # While this process is itself stopped (Ctrl-Z, a paused machine) time goes on, and workers do not.
            self._watch(min(time.monotonic() - before, 2 * _SLICE))

    def _received(self, worker: int) -> tuple[tuple[int, int], object]:
        try:
            task, batch = receive(self._channels[worker], self._memory)
        except Gone:
            raise self._lost(worker) from None
        except TimeoutError:
            raise self._stuck(worker) from None
        except OSError as error:
            raise WorkerError(f"what loader worker {worker} has made cannot be taken over: {error.strerror}") from error
        if isinstance(batch, Failure) and batch.trace:
            raise RuntimeError(f"in a loader worker:\n{batch.trace}")
        if isinstance(batch, Failure):
            raise WorkerError(f"loader worker {worker} cannot go on ({batch.line}){_ADVICE}")
        self._pending[worker] -= 1
        self._waited[worker] = 0.0
        return task, batch

    def _watch(self, seconds: float) -> None:
        """Raise `WorkerError` if a worker that has something to do has not gone on for too long."""
        for worker in range(self._count):
            begun, _ = self._memory.begun(worker)
            if begun != self._begun[worker] or not self._pending[worker]:
                self._begun[worker], self._waited[worker] = begun, 0.0
                continue
            self._waited[worker] += seconds
            if self._limit and self._waited[worker] >= (self._limit if begun else max(self._limit, TO_START)):
                raise self._stuck(worker)

    def _stuck(self, worker: int) -> WorkerError:
        begun, index = self._memory.begun(worker)
        if not begun:
            return WorkerError(f"loader worker {worker} has not started in {max(self._limit, TO_START):g} s")
        place = f" at {self._dataset.source(index)}" if index >= 0 else ""
        return WorkerError(
            f"loader worker {worker} has been{place} for {self._limit:g} s, all that DATA_LOADER.TIMEOUT allows an "
            "image: stopped, or a disk that does not answer? Run this again to go on"
        )

    def _lost(self, worker: int) -> WorkerError:
        failure = self._told_of(worker)
        if "error" in failure:
            return WorkerError(f"loader workers cannot start: {failure['error']}")
        if "pid" in failure:
            return WorkerError(f"loader worker {worker} (process {failure['pid']}) {_how(failure['code'])}{_ADVICE}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._parent.wait(TO_END)
        return WorkerError(f"the parent of the loader workers {_how(self._parent.returncode)}{_ADVICE}")

    def _told_of(self, worker: int) -> dict:
        """How a worker ended, or why none could start; nothing if the parent itself has ended."""
        with contextlib.suppress(OSError):
            self._control.sendall(f"{worker}\n".encode())
        try:
            return json.loads(self._control.makefile().readline() or "{}")
        except OSError:
            return {}


_ADVICE = ": short of memory? use fewer workers. Run this again to go on"


def _how(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _start(
    dataset: Loadable, memory: BatchMemory, count: int
) -> tuple[list[socket.socket], socket.socket, subprocess.Popen]:
    """Start the processes; returns the sockets of the workers, that of their parent, and the parent."""
    with contextlib.ExitStack() as stack:
        stack.callback(memory.close)
        pairs = [_socket_pair() for _ in range(1 + count)]
        control, *channels = [stack.enter_context(theirs) for _, theirs in pairs]
        told = Start(memory.descriptor, count, memory.size, [channel.fileno() for channel in channels])
        start = _start_file(told, dataset)
        stack.callback(os.close, start)
        parent = _parent(control.fileno(), start, [memory.descriptor, *told.channels])
    (control, _), *pairs = pairs
    return [ours for ours, _ in pairs], control, parent


def _socket_pair() -> list[socket.socket]:
    return [socket.socket(fileno=above_standard(end.detach())) for end in socket.socketpair()]


def _start_file(start: Start, dataset: object) -> int:
    descriptor = anonymous_file()
    try:
        with open(descriptor, "wb", closefd=False) as file:
            pickle.dump(start, file)
            pickle.dump(dataset, file, protocol=5)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _parent(control: int, start: int, descriptors: list[int]) -> subprocess.Popen:
    """The parent of the workers: a fresh interpreter, which does not run the main module again as `spawn` would."""
    # Ctrl-C, and SIGTERM from SLURM, reach the whole process group. The main process handles them and ends its workers,
    # which inherit that these two are blocked, from their first instruction on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(control), str(start), str(ROOT), *sys.path],
            stdin=subprocess.DEVNULL,
            pass_fds=[control, start, *descriptors],
            env=os.environ | dict.fromkeys(_THREADS, "1"),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(parent: subprocess.Popen, control: socket.socket, parts: tuple, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the main process: the workers are not its own
        return
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    for part in parts:
        part.close()
    try:
        parent.wait(TO_END)
    except subprocess.TimeoutExpired:  # stopped, or a worker waits for a disk
        parent.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            parent.wait(TO_END)
