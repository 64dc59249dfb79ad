"""One process per device: started here, or found already started by torchrun; and what the processes exchange.

The functions that communicate are no-ops in a single process.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from yacs.config import CfgNode

from core.environment import USER_ERROR_EXIT_CODE, is_user_error


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def launch(work: Callable[[CfgNode], None], cfg: CfgNode) -> None:
    """Run `work(cfg)` in every process of the run and return when all have ended.

    Under torchrun this process is one of them; otherwise NUM_GPUS processes are started, or none for one device.
    Raises `ValueError` when fewer GPUs are there than asked for, or the port is taken. A process that fails ends the
    others, and this one with a non-zero exit code.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if under_torchrun() else cfg.NUM_GPUS
    if cfg.NUM_GPUS and local_world > torch.cuda.device_count():
        raise ValueError(
            f"NUM_GPUS {local_world}: this machine has {torch.cuda.device_count()} usable GPUs; "
            "lower NUM_GPUS (0 is the CPU)"
        )
    if under_torchrun():
        _join(work, cfg, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    elif cfg.NUM_GPUS <= 1:
        work(cfg)
    else:
        _spawn(work, cfg, cfg.NUM_GPUS)


def _spawn(work: Callable[[CfgNode], None], cfg: CfgNode, world: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.HOST, cfg.PORT))
        except OSError as error:
            raise ValueError(f"PORT {cfg.PORT} on {cfg.HOST} cannot be used ({error.strerror}): give another") from None
    os.environ |= {"MASTER_ADDR": cfg.HOST, "MASTER_PORT": str(cfg.PORT)}
    user_errors = mp.get_context("spawn").SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of every process it ends
    context = mp.start_processes(
        _spawned, args=(work, cfg, world, user_errors), nprocs=world, join=False, start_method="spawn"
    )
    try:
        while not context.join():
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        # One process's mistake breaks the others' connections, and any of them may be noticed first.
        if not user_errors.empty():
            raise ValueError(user_errors.get()) from None
        if isinstance(error, mp.ProcessRaisedException):
            raise
        print(f"error: a process of the run ended: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for process in context.processes:  # still alive only if this process was interrupted
            process.terminate()
            process.join()


def _spawned(rank: int, work: Callable[[CfgNode], None], cfg: CfgNode, world: int, user_errors) -> None:
    try:
        _join(work, cfg, rank, world, rank)
    except ValueError as error:
        if not is_user_error(error):
            raise
        user_errors.put(str(error))
        sys.exit(USER_ERROR_EXIT_CODE)


def _join(work: Callable[[CfgNode], None], cfg: CfgNode, rank: int, world: int, local_rank: int) -> None:
    if cfg.NUM_GPUS:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo", rank=rank, world_size=world)
    work(cfg)
    # Not after a failure: the others may be waiting in a call that this process will never join.
    dist.destroy_process_group()


def training_device(num_gpus: int) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if num_gpus else torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
