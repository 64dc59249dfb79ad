"""Running sums of loss and errors, kept on the device so that reading them is rare."""

import datetime
import resource
import time

import torch
from torch import Tensor

from core.processes.distributed import all_reduce_sum, world_size


class Sums:
    """Sums of loss, top-1 and top-5 errors over images, since creation or `reset`."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, loss: Tensor, ranks: Tensor) -> None:
        """`loss` is the mean over these images; `ranks` [B] is how many classes beat the true one of each."""
        self.sums += torch.stack([loss.detach() * len(ranks), (ranks >= 1).sum(), (ranks >= 5).sum()])
        self.images += len(ranks)

    def merge(self, other: "Sums") -> None:
        """Add the sums of `other`."""
        self.sums += other.sums
        self.images += other.images

    def read(self) -> dict[str, float]:
        """Mean loss and errors in percent over all processes (a collective call), and the number of images."""
        count = torch.tensor([self.images], dtype=torch.float64, device=self.sums.device)
        loss, top1, top5, count = all_reduce_sum(torch.cat([self.sums, count])).tolist()
        images = max(count, 1.0)
        return {
            "loss": loss / images,
            "top1_err": 100.0 * top1 / images,
            "top5_err": 100.0 * top5 / images,
            "images": int(count),
        }

    def reset(self) -> None:
        self.sums.zero_()
        self.images = 0

    def state(self) -> list[float]:
        """The sums of this process as plain numbers."""
        return [*self.sums.tolist(), self.images]

    def restore(self, states: list[list[float]], rank: int) -> None:
        """Take back the states of all processes; where there are more or fewer now, the first one takes the total."""
        if len(states) == world_size():
            mine = states[rank]
        else:
            mine = [sum(column) for column in zip(*states, strict=True)] if rank == 0 else [0.0] * 4
        self.sums.copy_(torch.tensor(mine[:3], dtype=torch.float64))
        self.images = int(mine[3])


class Clock:
    """Time per iteration and what is left of the run."""

    def __init__(self):
        self.start = time.monotonic()
        self.iterations = 0

    def tick(self) -> None:
        self.iterations += 1

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def per_iteration(self) -> float:
        return self.seconds / max(self.iterations, 1)

    def eta(self, iterations_left: int) -> str:
        return str(datetime.timedelta(seconds=round(self.per_iteration * iterations_left)))


def memory_mb(device: torch.device) -> int:
    """Peak memory in MiB: what torch allocated on a GPU, what the process held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
