"""What the processes of a run exchange. In a single process every function here is a no-op."""

import datetime
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(item: Any) -> list[Any]:
    """Every process's item, in the order of ranks, for every process."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class Agreement:
    """Counters summed over all processes, known one call later so that nobody waits for anybody.

    Kept on the host and exchanged by gloo: a GPU need not be asked. Every process must call it equally often, and
    waits for the others at most `timeout`.
    """

    def __init__(self, size: int, *, timeout: datetime.timedelta):
        self.size = size
        self.group = None
        if world_size() > 1:  # a group does not inherit the timeout of the default one: it would be half an hour
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, counts: list[int]) -> list[int]:
        """Hand in this process's counts; returns the sums of the call before (in a single process, of this one)."""
        if self.group is None:
            return counts
        summed = [0] * self.size
        if self.pending is not None:
            work, tensor = self.pending
            work.wait()
            summed = tensor.tolist()
        tensor = torch.tensor(counts)
        self.pending = dist.all_reduce(tensor, group=self.group, async_op=True), tensor
        return summed

    def finish(self) -> None:
        """Wait for what is under way, so that the process may end."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None
