"""How the processes of a run find each other, also when some have died and all are started again.

torchrun keeps one store for all its restarts. What the dead have written is still there, and the number of restarts
that an agent gives its processes is its own: on several machines they differ. So the processes agree here on a part of
the store for themselves.
"""

import contextlib
import datetime
import os
import queue
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from core.base.errors import USER_ERROR_EXIT_CODE, Failure, UserError, ending
from core.processes.place import Place, place, under_agent, whole_number

MISTAKE = "dolg/mistake"  # key of the store: the user's mistake that has ended the run
AGENT_TIMEOUT = datetime.timedelta(seconds=60)  # the store of torchrun is there before its processes are
NAME_TIMEOUT = 20.0  # seconds until a name that nobody knows is a mistake: it may be about to be told to the network
ANSWER_TIMEOUT = 20.0  # seconds for one question to the store; a machine that is cut off stays silent for many minutes
PAUSE = 0.05  # seconds between two looks at the store; a wait inside of it would not hear a signal

_store: dist.Store | None = None  # of the run, once this process has opened it


def open_store(here: Place, timeout: datetime.timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's, or else one that process 0 holds.

    Raises `UserError` for an address that cannot be one, `Failure` if nobody answers there within `timeout`.
    """
    global _store
    if _store is not None:
        _store.set_timeout(timeout)
        return _store
    host, port = os.environ.get("MASTER_ADDR", ""), whole_number("MASTER_PORT", least=1, most=65535)
    _check_name(host)
    try:
        _store, *_ = next(rendezvous("env://", here.rank, here.world, timeout=timeout))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port} cannot be used (Address already in use): give another") from None
        seconds = round(timeout.total_seconds())
        raise Failure(
            f"process {here.rank} of {here.world} did not meet the others at MASTER_ADDR {host}, MASTER_PORT {port} "
            f"within {seconds} s ({one_line(error)})"
        ) from None
    _store.set_timeout(timeout)
    return _store


def _check_name(host: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", host):
        raise UserError(f"the environment's MASTER_ADDR is {host[:60]!r}, it takes the name or address of a machine")
    deadline = time.monotonic() + NAME_TIMEOUT
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"the environment's MASTER_ADDR {host} names no machine ({reason})") from None
        time.sleep(1.0)


def meet(store: dist.Store, here: Place, timeout: datetime.timedelta, *, device: str = "") -> tuple[dist.Store, int]:
    """A part of the store for these processes alone, and how often the run was started before.

    Every process gives itself a name that no other had. Process 0 answers each name that it finds with its own, and is
    content when all names that stand there now have taken note: only the living do so. Raises `UserError` if two
    processes have the same `device`, `Failure` if not all come within `timeout`.
    """
    name = f"{uuid.uuid4().hex}|{device}"
    _asked(lambda: store.set(f"dolg/name/{here.rank}", name), here)
    deadline = time.monotonic() + timeout.total_seconds()
    if here.rank == 0:
        first, others = name, [f"dolg/name/{rank}" for rank in range(1, here.world)]
        answered: set[str] = set()

        def all_have_joined() -> bool:
            if others and not store.check(others):
                return False
            names = [value.decode() for value in store.multi_get(others)] if others else []
            for new in set(names) - answered:
                store.set(f"dolg/answer/{new}", first)
            answered.update(names)
            if not all(store.check([f"{first}/joined/{other}"]) for other in names):
                return False
            _check_devices([name, *names])
            return True

        _poll(all_have_joined, here, deadline)
        before = _asked(lambda: store.add("dolg/starts", 1), here) - 1
        _asked(lambda: store.set(f"{first}/complete", str(before)), here)
    else:
        _poll(lambda: store.check([f"dolg/answer/{name}"]), here, deadline)
        first = _asked(lambda: store.get(f"dolg/answer/{name}"), here).decode()
        _asked(lambda: store.set(f"{first}/joined/{name}", ""), here)
        _poll(lambda: store.check([f"{first}/complete"]), here, deadline)
        before = int(_asked(lambda: store.get(f"{first}/complete"), here))
    return dist.PrefixStore(first, store), before


def _poll(done: Callable[[], bool], here: Place, deadline: float) -> None:
    while not _asked(done, here):
        if _mistake():
            raise SystemExit(USER_ERROR_EXIT_CODE)
        if time.monotonic() > deadline:
            raise Failure(f"process {here.rank} of {here.world} waited in vain for the others to start (DIST_TIMEOUT)")
        time.sleep(PAUSE)


def _asked(question: Callable[[], Any], here: Place) -> Any:
    """`_answer`; raises `Failure` for a store that is gone or silent."""
    try:
        return _answer(question)
    except (dist.DistError, TimeoutError) as error:
        raise Failure(f"process {here.rank} of {here.world} lost the others at the start ({one_line(error)})") from None


def _answer(question: Callable[[], Any]) -> Any:
    """`question()` about the store, whose own timeout knows nothing of a connection that is dead.

    Raises what it raises, and `TimeoutError` after ANSWER_TIMEOUT; the thread that still asks ends with the process.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=ANSWER_TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"the store has not answered for {ANSWER_TIMEOUT:.0f} s") from None
    if error is not None:
        raise error
    return answer


def _check_devices(names: list[str]) -> None:
    devices = [device for device in (name.partition("|")[2] for name in names) if device]
    if shared := {device for device in devices if devices.count(device) > 1}:
        raise UserError(
            f"{len(devices)} processes share {len(set(devices))} GPUs ({min(shared)} is taken twice): start one a GPU, "
            "or let each see another one"
        )


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Under torchrun one process tells a user's mistake; all others, and those started again, end at once."""
    here = place()
    if here is None:
        yield
        return
    if under_agent():
        open_store(here, AGENT_TIMEOUT)
        if _mistake():
            sys.exit(USER_ERROR_EXIT_CODE)
    try:
        yield
    except Exception as error:
        code, line = ending(error) or (None, "")
        if code == USER_ERROR_EXIT_CODE:
            mine = f"{uuid.uuid4().hex} {line}"
            if _mistake(mine) not in (None, mine):
                sys.exit(code)
        elif _mistake():  # the connections to a process that has made one break
            sys.exit(USER_ERROR_EXIT_CODE)
        raise


def _mistake(mine: str = "") -> str | None:
    """What has been told, by way of the store; `own` if nothing has. None where there is none, or no store any more."""
    store = _store
    if store is None:
        return None
    try:
        if mine:
            return _answer(lambda: store.compare_set(MISTAKE, "", mine)).decode()
        return _answer(lambda: store.get(MISTAKE) if store.check([MISTAKE]) else b"").decode() or None
    except (RuntimeError, TimeoutError):  # the process that held it has ended, or cannot be reached
        return None


def is_lost_exchange(error: BaseException) -> bool:
    """Whether the exchange between processes failed: another one has ended, hangs, or cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def one_line(error: BaseException) -> str:
    """An error of torch.distributed without its stack and the place in its source."""
    text = str(error).partition("\nException raised from")[0].partition(" Original exception:")[0]
    return re.sub(r"^\[[^\]]*\] *", "", " ".join(text.split()))[:300]
