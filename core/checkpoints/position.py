"""How far a run has come, and what it has measured on the way."""

import math
from dataclasses import dataclass, field

import torch

from core.meters import Sums
from core.processes.distributed import rank


@dataclass
class Position:
    """`epochs_done` whole epochs and `iteration` iterations of the next."""

    device: torch.device
    epochs_done: int = 0
    iteration: int = 0
    lowest_error: float = math.inf  # of all validations, percent
    best_score: float = -math.inf  # of all evaluations: what decides which checkpoint is the best
    broken: list[str] = field(default_factory=list)  # images that were replaced, in the order they were met
    epoch: Sums = field(init=False)  # this process's sums since the epoch began, but for
    period: Sums = field(init=False)  # those since the last log line

    def __post_init__(self):
        self.epoch, self.period = Sums(self.device), Sums(self.device)

    @property
    def place(self) -> tuple[int, int]:
        return self.epochs_done, self.iteration

    def next_epoch(self) -> None:
        self.epochs_done, self.iteration = self.epochs_done + 1, 0
        self.epoch.reset()

    def sums(self) -> list[list[float]]:
        """This process's sums, as plain numbers."""
        return [self.epoch.state(), self.period.state()]

    def shared(self) -> dict:
        """What is the same in all processes, as plain values."""
        return {"lowest_error": self.lowest_error, "best_score": self.best_score, "broken": list(self.broken)}

    def restore(self, run: dict) -> None:
        """Take `shared()` and the `sums` of all processes back from a checkpoint's `run`."""
        self.lowest_error = run.get("lowest_error", math.inf)
        self.best_score = run.get("best_score", -math.inf)
        self.broken = list(run.get("broken", []))
        sums = run.get("sums") or []
        if self.iteration and len(sums) > 0:
            self.epoch.restore([each[0] for each in sums], rank())
            self.period.restore([each[1] for each in sums], rank())
