"""One process per device: started here, or found already started by torchrun. If one fails, all are ended."""

import contextlib
import ctypes
import datetime
import math
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from core.base.errors import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE, Failure, UserError, ending, exit_on_signals
from core.base.terminal import safe_streams
from core.config_checks import check_split
from core.processes.faults import FailedElsewhere
from core.processes.interrupt import Stopped
from core.processes.meeting import is_lost_exchange, meet, one_line, open_store
from core.processes.place import Place, check_threads, device_index, place, under_agent

Work = Callable[[CfgNode], None]
GRACE = 5.0  # seconds for the other processes to end by themselves, when one has failed
LONGEST_TRACE = 20000  # characters: a report must fit into a pipe that nobody may read any more
PR_SET_PDEATHSIG = 1  # prctl(2)

_restarts = 0


class Report(NamedTuple):
    """Why a process failed: `line` is empty for a defect of the code, which `trace` tells of.

    `lost`: another process was not there any more, or did not answer.
    """

    code: int
    line: str
    trace: str
    lost: bool


def restarts() -> int:
    """How often torchrun has started the processes of this run again after a failure, on whatever machine."""
    return _restarts


def launch(work: Work, cfg: CfgNode) -> None:
    """Run `work(cfg)` in every process of the run and return when all have ended.

    Under torchrun this process is one of them; otherwise NUM_GPUS processes are started, or none for one device.
    Raises `UserError` when fewer GPUs are there than asked for, or the port is taken. A process that fails ends the
    others, and this one with a non-zero exit code; SIGINT and SIGTERM are handed on to all.
    """
    check_threads()
    here = place()
    check_split(cfg, here.world if here else max(cfg.NUM_GPUS, 1))
    visible = torch.cuda.device_count() if cfg.NUM_GPUS else 0
    local_world = here.local_world or 1 if here else cfg.NUM_GPUS
    each_sees_its_own = here is not None and visible == 1  # `meet` looks whether it is so
    if cfg.NUM_GPUS and local_world > visible and not each_sees_its_own:
        raise UserError(
            f"NUM_GPUS {local_world}: this machine has {visible} usable GPUs; lower NUM_GPUS (0 is the CPU)"
        )
    if here is not None and (here.world > 1 or under_agent()):
        join_started(work, cfg, here)
    elif here is not None or cfg.NUM_GPUS <= 1:
        work(cfg)
    else:
        spawn(work, cfg, cfg.NUM_GPUS)


def join_started(work: Work, cfg: CfgNode, here: Place) -> None:
    """Be process `here` of a run whose processes are started from outside."""
    global _restarts
    timeout, device = datetime.timedelta(seconds=cfg.DIST_TIMEOUT), ""
    if cfg.NUM_GPUS:
        index = device_index(here.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
        device = f"{socket.gethostname()} {torch.cuda.get_device_properties(index).uuid}"
    with _ended_at_once():
        store, _restarts = meet(open_store(here, timeout), here, timeout, device=device)
    join(work, cfg, store, here.rank, here.world)


def join(work: Work, cfg: CfgNode, store: dist.Store, rank: int, world: int) -> None:
    """Be process `rank` of the run, whose processes share `store`."""
    backend, timeout = cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo", datetime.timedelta(seconds=cfg.DIST_TIMEOUT)
    try:
        with _ended_at_once():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        try:
            work(cfg)
        except Stopped:
            _leave()
            raise
        _leave()  # not after a failure: the others may be waiting in a call that this process will never join
    except RuntimeError as error:
        if not is_lost_exchange(error):
            raise
        raise Failure(
            f"process {rank} of the run lost the others, of which one has ended, hangs or cannot be reached: "
            f"{one_line(error)} (DIST_TIMEOUT is {cfg.DIST_TIMEOUT} s)"
        ) from error


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let SIGTERM end this process inside calls that would not return to Python; there is nothing to clean up yet."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    """End the exchange with the others: together, for a connection that breaks may abort those that still use it."""
    dist.barrier()
    dist.destroy_process_group()


def spawn(work: Work, cfg: CfgNode, world: int) -> None:
    """Start `world` processes on this machine and wait for them."""
    store = _own_store(cfg)  # held here, it outlives each of them
    context = mp.get_context("spawn")
    processes, pipes = [], []
    for rank in range(world):
        reading, writing = context.Pipe(duplex=False)
        arguments = (rank, work, cfg, world, store.port, writing)
        processes.append(context.Process(target=_spawned, args=arguments, name=f"rank {rank}"))
        pipes.append((reading, writing))
    failures: list[Report] = []
    with _handing_signals_on(processes) as received:
        try:
            for process, (_, writing) in zip(processes, pipes, strict=True):
                process.start()
                writing.close()  # the other end tells when the process has ended
            codes = _wait(processes, [reading for reading, _ in pipes], failures, timeout=cfg.DIST_TIMEOUT)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    if received:
        for failure in failures[:1]:
            print(f"error: {failure.line}" if failure.line else failure.trace.rstrip(), file=sys.stderr)
        sys.exit(128 + received[0])
    if any(code != 0 for code in codes):
        _tell(failures, codes)


def _own_store(cfg: CfgNode) -> dist.TCPStore:
    """A store on this machine where its processes meet; at a free port if none is named."""
    try:
        family, *_, address = socket.getaddrinfo(cfg.HOST, cfg.PORT, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:  # the store itself takes all addresses of this machine
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return dist.TCPStore(cfg.HOST, cfg.PORT, is_master=True, wait_for_workers=False)
    except (OSError, UnicodeError, dist.DistError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        what = f"PORT {cfg.PORT} on {cfg.HOST}" if cfg.PORT else f"HOST {cfg.HOST}"
        raise UserError(f"{what} cannot be used ({reason}): give another") from None


@contextlib.contextmanager
def _handing_signals_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the processes; yields the list of those received. A second one kills them."""
    received: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                if len(received) == 1:
                    os.kill(process.pid, number)
                else:
                    process.kill()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[BaseProcess], pipes: list[Connection], failures: list[Report], *, timeout: float
) -> list[int | None]:
    """Wait until all have ended: from the first failure on at most GRACE seconds more, from the first end on `timeout`.

    Returns the exit codes, None for those that still run; appends what the processes report to `failures`.
    """
    running = {process.sentinel: process for process in processes}
    reports = set(pipes)
    deadline = math.inf
    while running:
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for ready in multiprocessing.connection.wait([*running, *reports], timeout=left):
            if isinstance(ready, Connection):
                try:
                    failures.append(ready.recv())
                    deadline = min(deadline, time.monotonic() + GRACE)  # it may not come to its end
                except (EOFError, OSError):
                    reports.discard(ready)
                continue
            assert isinstance(ready, int)
            process = running.pop(ready)
            process.join()
            deadline = min(deadline, time.monotonic() + (GRACE if process.exitcode else timeout + GRACE))
        if time.monotonic() >= deadline:
            break
    for pipe in reports:
        with contextlib.suppress(EOFError, OSError):
            while pipe.poll():
                failures.append(pipe.recv())
    return [process.exitcode for process in processes]


def _tell(failures: list[Report], codes: list[int | None]) -> None:
    """Say why the run ended, and end this process with a code that is not 0.

    A failure breaks the others' connections, and theirs may be noticed first: a user's mistake, then a process that a
    signal ended, are held for the cause before anything else, and last a process that has lost the others.
    """
    failures.sort(key=lambda failure: (failure.code != USER_ERROR_EXIT_CODE, failure.lost))  # stable
    cause = failures[0] if failures else None
    if cause and cause.code == USER_ERROR_EXIT_CODE:
        raise UserError(cause.line)
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            print(f"error: process {rank} of the run was ended by {signal.Signals(-code).name}", file=sys.stderr)
            sys.exit(FAILURE_EXIT_CODE)
    silent = [str(rank) for rank, code in enumerate(codes) if code is None]
    if silent and (cause is None or cause.lost):
        why = f": {cause.line}" if cause else ""
        raise Failure(f"process {', '.join(silent)} of the run did not answer any more and was ended{why}")
    if cause and cause.line:
        raise Failure(cause.line)
    if cause:
        print(cause.trace.rstrip(), file=sys.stderr)
        sys.exit(cause.code)
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    if code <= 128:  # above, it has saved and ended as a signal told it
        print(f"error: process {rank} of the run ended with exit code {code}", file=sys.stderr)
    sys.exit(code)


def _spawned(rank: int, work: Work, cfg: CfgNode, world: int, port: int, reports: Connection) -> None:
    if sys.platform == "linux":  # the parent's death, even by SIGKILL, is told to this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    exit_on_signals()
    try:
        if cfg.NUM_GPUS:
            torch.cuda.set_device(rank)
        store = dist.TCPStore(cfg.HOST, port, timeout=datetime.timedelta(seconds=cfg.DIST_TIMEOUT))
        with safe_streams():
            join(work, cfg, store, rank, world)
    except Exception as error:
        code, line = ending(error) or (FAILURE_EXIT_CODE, "")
        trace = f"process {rank}:\n{traceback.format_exc()}"
        lost = isinstance(error, FailedElsewhere) or is_lost_exchange(error.__cause__ or error)
        reports.send(Report(code, line, trace[-LONGEST_TRACE:], lost))
        sys.exit(code)
