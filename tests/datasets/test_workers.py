"""Loader workers that are killed, stopped, stuck or cannot start; and what is left of them afterwards."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from core.base.errors import entry_point
from datasets import workers
from datasets.loader import make_loader
from datasets.workers import WorkerError
from tests.loader_sets import LOCK, BadStart, Does, Facts, alive
from tests.small_run import child_environment

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: reads /proc")


class Batches(list):
    """Lists of keys, one by one."""

    def __init__(self, keys):
        super().__init__([key] for key in keys)


def loader_of(keys, *, dataset=None, count: int = 2, timeout: float = 60.0):
    return make_loader(dataset or Does(), Batches(keys), workers=count, timeout=timeout)


def children() -> set[int]:
    """All processes below this one."""
    found, waiting = set(), [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                new = set(map(int, task.read_text().split())) - found
            except OSError:
                continue
            found |= new
            waiting += new
    return found


def gone(pids: set[int], *, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_batches_come_in_their_order_however_long_each_takes():
    loader = loader_of([-6, 1, 2, -3, 4, "a", -2, 7, 8])
    for _ in range(2):
        items = list(loader)
        assert [key for key, *_ in items] == [-6, 1, 2, -3, 4, "a", -2, 7, 8]
        assert len({pid for _, pid, _ in items}) == 2
        for key, _, array in items[:5]:
            np.testing.assert_array_equal(array, np.full((200, 300), key % 251, np.uint8))
    loader.close()


def test_fewer_batches_than_workers_and_none():
    assert len(list(loader_of([1], count=3))) == 1
    assert list(loader_of([], count=2)) == []


@linux
def test_workers_live_on_are_small_and_leave_signals_to_the_main_process():
    loader = loader_of(range(8), dataset=Facts())
    first = list(loader)
    pids = {pid for pid, *_ in first}
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in children():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    second = list(loader)
    assert {pid for pid, *_ in second} == pids
    assert {tuple(rest) for _, *rest in first + second} == {(1, 1, False)}  # threads; PyTorch
    loader.close()


def test_what_another_thread_holds_is_not_held_in_a_worker():
    """After a fork of the main process it would be, for ever: see CPython's issue 112275."""
    with LOCK:
        assert list(loader_of(["lock"], count=1)) == [True]


def command(keys, capsys, *, code: int = 1, **settings) -> str:
    """The only line that a command with such a loader ends in."""

    @entry_point
    def main():
        list(loader_of(keys, **settings))

    before = children()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert gone(children() - before)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@linux
@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("killed", "was killed by SIGKILL: short of memory? use fewer workers. Run this again to go on"),
        ("exits", "ended with exit code 3"),
        ("memory", "cannot go on (MemoryError): short of memory?"),
        ("stopped", "has been at image7.jpg for 1 s, all that DATA_LOADER.TIMEOUT allows an image"),
        ("stuck", "has been at image7.jpg for 1 s, all that DATA_LOADER.TIMEOUT allows an image"),
        ("busy", "has been at image7.jpg for 1 s, all that DATA_LOADER.TIMEOUT allows an image"),
    ],
)
def test_one_that_cannot_go_on_ends_the_command_in_one_line(act, said, capsys):
    line = command([1, 2, act, 4, 5, 6], capsys, timeout=1.0)
    assert line.startswith("error: loader worker 0 ") and said in line


@linux
def test_how_a_worker_ended_is_known_where_the_signal_that_tells_it_is_ignored(capsys):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # some programs that start others leave it so
    try:
        assert "was killed by SIGKILL" in command(["killed", 2], capsys)
    finally:
        signal.signal(signal.SIGCHLD, before)


@linux
def test_the_parent_of_the_workers_may_be_killed(capsys):
    line = command([1, "parent killed", 3, 4], capsys)
    assert line.startswith("error: the parent of the loader workers was killed by SIGKILL")


@linux
def test_workers_that_cannot_start_say_why(capsys, monkeypatch):
    line = command([1, 2], capsys, dataset=BadStart())
    assert line == ("error: loader workers cannot start: ImportError: libGL.so.1: cannot open shared object file")
    monkeypatch.setattr(workers, "_PROGRAM", workers._PROGRAM.replace("datasets.worker ", "datasets.no_worker "))
    assert "cannot start: ModuleNotFoundError: No module named 'datasets.no_worker'" in command([1], capsys)
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    assert "the parent of the loader workers ended with exit code 1" in command([1], capsys)


@linux
def test_workers_that_do_not_start_in_time(capsys, monkeypatch):
    monkeypatch.setattr(workers, "TO_START", 0.6)
    monkeypatch.setattr(workers, "_PROGRAM", "import time; time.sleep(1000)")
    monkeypatch.setattr(workers, "TO_END", 0.2)
    assert command([1], capsys, timeout=0.1) == "error: loader worker 0 has not started in 0.6 s"


@linux
def test_too_many_open_files():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = loader_of(range(100))
    items = iter(loader)
    next(items)
    try:
        os.close(lowest := os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
        with pytest.raises(WorkerError, match="has made cannot be taken over: Too many open files"):
            list(items)
        with pytest.raises(WorkerError, match="2 loader workers cannot start: Too many open files"):
            list(loader_of([1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize(
    ("act", "trace"), [("defect", "KeyError: 'no"), ("leaves", "SystemExit: no"), ("unsendable", "cannot pickle")]
)
def test_a_defect_of_the_code_keeps_its_traceback(act, trace):
    with pytest.raises(RuntimeError, match="(?s)in a loader worker:\nTraceback.*" + trace):
        list(loader_of([1, act, 3]))


@linux
def test_time_in_which_this_process_is_stopped_itself_does_not_count(monkeypatch):
    now = iter(range(0, 10**9, 3600))  # an hour between two looks at the clock
    monkeypatch.setattr(workers.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(workers, "_SLICE", 0.05)
    assert len(list(loader_of([1, -5, 3], timeout=3.0))) == 3


@linux
def test_no_process_descriptor_or_shared_memory_is_left(capsys):
    def state() -> tuple:
        return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm")), threading.active_count()

    list(loader_of([1, 2, 3]))  # what is made once
    before, processes = state(), children()
    for number in range(6):
        loader = loader_of([1, 2, 3, 4, 5], count=1 + number % 3)
        iterator = iter(loader)
        next(iterator)
        if number % 3 == 0:
            loader.close()
        elif number % 3 == 1:
            list(iterator)
        del loader, iterator
    assert gone(children() - processes)
    assert state() == before


PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from datasets.workers import Workers
from tests.loader_sets import Does

workers = Workers(Does(), count=2, slot=0, limit=60)
for number, item in enumerate(workers.map([key] for key in (1, 2, -1, -1, 5, 6, -1, 8) * 1000)):
    if number == 3:
        parent = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        print(parent, Path(f"/proc/{parent.strip()}/task/{parent.strip()}/children").read_text(), flush=True)
        if sys.argv[2] == "exit":
            sys.exit(0)
        if sys.argv[2] == "crash":
            1 / 0
"""


@linux
@pytest.mark.parametrize("how", ["exit", "crash", "SIGKILL", "SIGINT"])
def test_no_worker_outlives_the_main_process_nor_prints_anything(how):
    command = [sys.executable, "-c", PROGRAM, str(ROOT), how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=child_environment(), **pipes, **own) as process:
        pids = {int(pid) for pid in process.stdout.readline().split()}
        assert len(pids) == 3
        if how.startswith("SIG"):
            number = getattr(signal, how)
            # From a terminal all of the group get it.
            os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    assert gone(pids)
    expected = {"exit": 0, "crash": 1, "SIGINT": 1}
    assert errors.count("Traceback") == expected.get(how, 0), errors


FULL = """
mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"
"""
WITHOUT_SHARED_MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from datasets.workers import Workers
from tests.loader_sets import Does

print(sum(item[2].size for item in Workers(Does(), count=2, slot=0, limit=60).map([key] for key in range(40))))
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="NOT CHECKED: mounting a small /dev/shm needs root",
)
def test_a_full_dev_shm_does_not_matter():
    """Docker gives 64 MB. Semaphores and tensors of other loaders lie there."""
    command = ["unshare", "-m", "sh", "-c", FULL, "sh", sys.executable, "-c", WITHOUT_SHARED_MEMORY, str(ROOT)]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout.split(), ended.stderr) == (["2400000"], "")
