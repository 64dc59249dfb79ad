"""Running sums of loss and errors, kept on the device so that reading them is rare."""

import datetime
import resource
import time

import torch
from torch import Tensor

from core.distributed import all_reduce_sum


def errors(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> list[Tensor]:
    """Number of images whose label is not among the k largest logits, for every k; k stops at the class count."""
    most = min(max(ks), logits.shape[1])
    hits = logits.topk(most, dim=1).indices == labels[:, None]
    return [len(labels) - hits[:, : min(k, most)].sum() for k in ks]


class Sums:
    """Sums of loss, top-1 and top-5 errors over images, since creation or `reset`."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss` is the mean over this batch."""
        top1, top5 = errors(logits, labels)
        count = torch.tensor(len(labels), device=self.sums.device)
        self.sums += torch.stack([loss.detach() * count, top1, top5, count]).to(self.sums.dtype)

    def read(self) -> dict[str, float]:
        """Mean loss and errors in percent over all processes (a collective call), and the number of images."""
        loss, top1, top5, count = all_reduce_sum(self.sums.clone()).tolist()
        images = max(count, 1.0)
        return {
            "loss": loss / images,
            "top1_err": 100.0 * top1 / images,
            "top5_err": 100.0 * top5 / images,
            "images": int(count),
        }

    def reset(self) -> None:
        self.sums.zero_()


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
