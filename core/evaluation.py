"""Evaluation during training: loss and errors on the validation list, and mAP on retrieval sets."""

import math
from collections.abc import Callable

import torch
from yacs.config import CfgNode

from core import builders
from core.checkpoints.position import Position
from core.logging import log_stats
from core.meters import Sums, memory_mb
from core.processes.distributed import gather_objects
from core.processes.faults import Faults
from core.processes.progress import progress

# Scores the sets of TEST.RETRIEVAL: (cfg, network, poll) -> set -> {"easy": mAP, "medium": mAP, "hard": mAP} in
# percent, None without queries. A collective call; `poll` raises if the run is to stop, and every process must call it
# equally often, and twice before any other exchange.
Scorer = Callable[[CfgNode, builders.Classifier, Callable[[], None]], dict[str, dict[str, float | None]]]


class Evaluation:
    """Evaluates a network at the end of an epoch and knows whether it is the best so far."""

    def __init__(
        self,
        cfg: CfgNode,
        device: torch.device,
        position: Position,
        loader: builders.ImageLoader | None,
        score: Scorer | None,
    ):
        self.cfg, self.device, self.position = cfg, device, position
        self.loader = loader
        self.score = score if cfg.TEST.RETRIEVAL else None

    def __call__(self, network: builders.Classifier, faults: Faults) -> bool:
        """Log everything there is to measure; returns whether it is the best so far.

        The mean of Medium over the retrieval sets decides, without such sets the top-1 error of validation.
        """
        network.eval()
        score = None
        if self.loader is not None:
            score = -self.validate(network, faults)
        if self.score is not None:
            score = self.score_retrieval(network, faults)
        if score is None or not score > self.position.best_score:
            return False
        self.position.best_score = score
        return True

    @property
    def epoch(self) -> str:
        return f"{self.position.epochs_done + 1}/{self.cfg.OPTIM.MAX_EPOCH}"

    @torch.no_grad()
    def validate(self, network: builders.Classifier, faults: Faults) -> float:
        """Loss and errors over every image of the list exactly once, from plain cosines; returns the top-1 error."""
        assert self.loader is not None
        sums = Sums(self.device)
        polls = min(gather_objects(len(self.loader)))  # a process may have one batch less than the others
        batches = builders.batches_on_device(self.loader, self.device)
        bar = progress(batches, "validation", unit="batch", leave=False)
        with network.desc_cls.gathered(), faults.shared(), bar:
            for number, batch in enumerate(bar):
                if number < polls:
                    faults.poll()
                faults.met(batch.broken)
                sums.add(*network(batch.images, batch.labels))
        stats = sums.read()  # may overflow in the first epochs, whose batch-norm statistics are half those of the start
        self.position.lowest_error = min(self.position.lowest_error, stats["top1_err"])
        lowest = self.position.lowest_error
        log_stats("test_epoch", epoch=self.epoch, min_top1_err=lowest, mem=memory_mb(self.device), **stats)
        return stats["top1_err"]

    def score_retrieval(self, network: builders.Classifier, faults: Faults) -> float:
        """mAP of the sets in TEST.RETRIEVAL; returns the mean of Medium over the sets."""
        assert self.score is not None
        with faults.shared():
            scores = self.score(self.cfg, network, faults.poll)
        for name, values in scores.items():
            log_stats("retrieval", epoch=self.epoch, set=name, **values)
        return math.fsum(values["medium"] or 0.0 for values in scores.values()) / len(scores)
