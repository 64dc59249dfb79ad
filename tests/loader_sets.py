"""Data sets for loader workers, in a module of their own: workers import what they are given, and not pytest."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from datasets.transforms import TrainTransform
from evaler.extraction.decoder import Decoder

LOCK = threading.Lock()


class Facts:
    """An item is what a worker knows about itself: its process, threads of OpenCV, of all, and whether it has torch."""

    worker = None

    def __getitems__(self, keys: list[int]) -> list[int]:
        threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
        return [os.getpid(), cv2.getNumThreads(), threads, "torch" in sys.modules]


class Does:
    """An item is what `act` returns for its key, which may be what ends a worker."""

    worker = None

    def source(self, index: int) -> str:
        return f"image{index}.jpg"

    def __getitems__(self, keys: list) -> object:
        (key,) = keys
        if self.worker:
            self.worker.begin(7)
        return act(key)


def act(key: object) -> object:
    if key == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if key == "stuck":
        time.sleep(1000)
    if key == "busy":
        while True:
            pass
    if key == "parent killed":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if key == "memory":
        raise MemoryError
    if key == "defect":
        raise KeyError("no such thing")
    if key == "leaves":
        sys.exit("no such thing")
    if key == "unsendable":
        return threading.Lock()
    if key == "exits":
        os._exit(3)
    if key == "lock":
        return LOCK.acquire(timeout=5)
    if isinstance(key, int) and key < 0:
        time.sleep(-key / 10)
    return key, os.getpid(), np.full((200, 300), hash(key) % 251, np.uint8)


class BadStart(Does):
    """A worker cannot make this one out of what it is handed."""

    def __init__(self) -> None:
        self.something = 1

    def __setstate__(self, state: dict) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")


class Told(TrainTransform):
    """Every pixel is the number of the process."""

    def write(self, file, rng, out):
        out[:] = os.getpid()
        return np.zeros(3, np.float32)


class Killed(Decoder):
    """Its third picture kills the process that decodes it, as the system does where memory ends."""

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
