"""One process per device: started here, or found already started by torchrun. If one fails, all are ended."""

import contextlib
import ctypes
import datetime
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from yacs.config import CfgNode

from core.environment import FAILURE_EXIT_CODE, USER_ERROR_EXIT_CODE, ending, exit_on_signals
from core.interrupt import Stopped
from core.terminal import safe_streams

Work = Callable[[CfgNode], None]
GRACE = 5.0  # seconds for the other processes to end by themselves, when one has failed
PR_SET_PDEATHSIG = 1  # prctl(2)


class Report(NamedTuple):
    """Why a process failed: `line` is empty for a defect of the code, which `trace` tells of."""

    code: int
    line: str
    trace: str


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def restarts() -> int:
    """How often torchrun has restarted the processes of this run after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch(work: Work, cfg: CfgNode) -> None:
    """Run `work(cfg)` in every process of the run and return when all have ended.

    Under torchrun this process is one of them; otherwise NUM_GPUS processes are started, or none for one device.
    Raises `ValueError` when fewer GPUs are there than asked for, or the port is taken. A process that fails ends the
    others, and this one with a non-zero exit code; SIGINT and SIGTERM are handed on to all.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if under_torchrun() else cfg.NUM_GPUS
    if cfg.NUM_GPUS and local_world > torch.cuda.device_count():
        raise ValueError(
            f"NUM_GPUS {local_world}: this machine has {torch.cuda.device_count()} usable GPUs; "
            "lower NUM_GPUS (0 is the CPU)"
        )
    if under_torchrun():
        join(work, cfg, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    elif cfg.NUM_GPUS <= 1:
        work(cfg)
    else:
        spawn(work, cfg, cfg.NUM_GPUS)


def join(work: Work, cfg: CfgNode, rank: int, world: int, local_rank: int) -> None:
    """Be process `rank` of the run."""
    if cfg.NUM_GPUS:
        torch.cuda.set_device(local_rank)
    backend = cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo"
    timeout = datetime.timedelta(seconds=cfg.DIST_TIMEOUT)
    store = None
    if restarts():  # torchrun keeps its store: the addresses of the processes that have died are still in it
        agents, *_ = next(rendezvous("env://", rank, world, timeout=timeout))
        store = dist.PrefixStore(f"restart {restarts()}", agents)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        work(cfg)
    except Stopped:
        _leave()
        raise
    _leave()  # not after a failure: the others may be waiting in a call that this process will never join


def _leave() -> None:
    """End the exchange with the others: together, for a connection that breaks may abort those that still use it."""
    dist.barrier()
    dist.destroy_process_group()


def spawn(work: Work, cfg: CfgNode, world: int) -> None:
    """Start `world` processes on this machine and wait for them."""
    _check_port(cfg)
    os.environ |= {"MASTER_ADDR": cfg.HOST, "MASTER_PORT": str(cfg.PORT)}
    context = mp.get_context("spawn")
    reports = context.SimpleQueue()
    processes = [
        context.Process(target=_spawned, args=(rank, work, cfg, world, reports), name=f"rank {rank}")
        for rank in range(world)
    ]
    with _handing_signals_on(processes) as received:
        try:
            for process in processes:
                process.start()
            codes = _wait(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = []
    while not reports.empty():
        failures.append(reports.get())
    if received:
        for failure in failures[:1]:
            print(f"error: {failure.line}" if failure.line else failure.trace.rstrip(), file=sys.stderr)
        sys.exit(128 + received[0])
    if any(codes):
        _tell(failures, codes)


def _check_port(cfg: CfgNode) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.HOST, cfg.PORT))
        except OSError as error:
            raise ValueError(f"PORT {cfg.PORT} on {cfg.HOST} cannot be used ({error.strerror}): give another") from None


@contextlib.contextmanager
def _handing_signals_on(processes: list[mp.Process]) -> Iterator[list[int]]:
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


def _wait(processes: list[mp.Process]) -> list[int]:
    """Wait until all have ended; from the first failure on, at most GRACE seconds more.

    Returns the exit codes; 0 stands for those that still run.
    """
    running = {process.sentinel: process for process in processes}
    deadline = None
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for sentinel in multiprocessing.connection.wait(list(running), timeout=left):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() >= deadline:
            break
    return [process.exitcode or 0 for process in processes]


def _tell(failures: list[Report], codes: list[int]) -> None:
    """Say why the run ended, and end this process with a code that is not 0.

    A failure breaks the others' connections, and theirs may be noticed first: a user's mistake, then a process that a
    signal ended, are held for the cause before anything else.
    """
    failures.sort(key=lambda failure: failure.code != USER_ERROR_EXIT_CODE)  # stable: else the first to come
    if failures and failures[0].code == USER_ERROR_EXIT_CODE:
        raise ValueError(failures[0].line)
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"error: process {rank} of the run was ended by {signal.Signals(-code).name}", file=sys.stderr)
            sys.exit(FAILURE_EXIT_CODE)
    if failures and failures[0].line:
        raise FloatingPointError(failures[0].line)
    if failures:
        print(failures[0].trace.rstrip(), file=sys.stderr)
        sys.exit(failures[0].code)
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    if code <= 128:  # above, it has saved and ended as a signal told it
        print(f"error: process {rank} of the run ended with exit code {code}", file=sys.stderr)
    sys.exit(code)


def _spawned(rank: int, work: Work, cfg: CfgNode, world: int, reports: mp.SimpleQueue) -> None:
    if sys.platform == "linux":  # the parent's death, even by SIGKILL, is told to this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    exit_on_signals()
    try:
        with safe_streams():
            join(work, cfg, rank, world, rank)
    except Exception as error:
        code, line = ending(error) or (FAILURE_EXIT_CODE, "")
        reports.put(Report(code, line, f"process {rank}:\n{traceback.format_exc()}"))
        sys.exit(code)
