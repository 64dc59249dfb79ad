"""A class matrix split over the processes: rank r holds the rows first..last of the classes.

The parts are contiguous and differ by at most one row. Everything goes through the default process group. One process
that holds all rows is the ordinary case, and needs no group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import ModelError


def shard_bounds(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last class of `rank`. Raises `ModelError` if there are fewer classes than processes."""
    if num_classes < world:
        raise ModelError(f"{num_classes} classes cannot be split over {world} processes: switch the sharded head off")
    return num_classes * rank // world, num_classes * (rank + 1) // world


def shard(full: Tensor, rank: int, world: int) -> Tensor:
    """The rows of `full` [classes, ...] that belong to `rank`: a view."""
    first, last = shard_bounds(len(full), rank, world)
    return full[first:last]


def gather(local: Tensor, num_classes: int) -> Tensor:
    """The rows [rows, ...] of all ranks together: [classes, ...] on every rank, on the device of `local`.

    A collective; for a parameter and for an optimizer state of its shape alike. What it returns has no gradient.
    """
    full = local.new_empty(num_classes, *local.shape[1:], requires_grad=False)
    for rank, rows in _rows_of_all_ranks(local, num_classes):
        shard(full, rank, dist.get_world_size()).copy_(rows)
    return full


def gather_to_main(local: Tensor, num_classes: int) -> Tensor | None:
    """As `gather`, but in the CPU memory of rank 0 only; None elsewhere. A collective."""
    full = None
    if dist.get_rank() == 0:
        full = torch.empty(num_classes, *local.shape[1:], dtype=local.dtype)
    for rank, rows in _rows_of_all_ranks(local, num_classes):
        if full is not None:
            shard(full, rank, dist.get_world_size()).copy_(rows)
    return full


def _rows_of_all_ranks(local: Tensor, num_classes: int):
    """Yield (rank, its rows), one rank after the other: no rank needs room for more than one part beside its own."""
    world, own = dist.get_world_size(), dist.get_rank()
    first, last = shard_bounds(num_classes, own, world)
    assert len(local) == last - first, f"rank {own} holds {len(local)} rows of {num_classes}, not {last - first}"
    for rank in range(world):
        first, last = shard_bounds(num_classes, rank, world)
        rows = local.detach().contiguous() if rank == own else local.new_empty(last - first, *local.shape[1:])
        dist.broadcast(rows, src=rank)
        yield rank, rows


@dataclass(frozen=True)
class Shards:
    """Which classes this process holds, and how it talks to those that hold the others."""

    num_classes: int
    rank: int = 0
    world: int = 1

    @property
    def bounds(self) -> tuple[int, int]:
        return shard_bounds(self.num_classes, self.rank, self.world)

    def join(self, batch: Tensor) -> Tensor:
        """[b, ...] on every rank, b equal -> [world b, ...] in the order of ranks."""
        if self.world == 1:
            return batch
        parts = [torch.empty_like(batch, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, batch.contiguous())
        return torch.cat(parts)

    def own(self, joined: Tensor) -> Tensor:
        """[world b, ...] -> this rank's [b, ...]."""
        return joined.unflatten(0, (self.world, -1))[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over the ranks; `values` may be overwritten."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values
