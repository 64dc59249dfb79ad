"""Training: set up, then epochs of steps, evaluation and checkpoints; from any checkpoint on, bit by bit the same."""

import contextlib
import datetime
from pathlib import Path

import torch
from yacs.config import CfgNode

from core import builders
from core.average import MovingAverage
from core.base.errors import UserError
from core.base.locks import folder_lock
from core.checkpoints.checkpoint import (
    BEST,
    checkpoint_path,
    checkpoints,
    link_best,
    newest_checkpoint,
    place_of,
    prune,
    remove_unfinished,
    write_checkpoint,
)
from core.checkpoints.output import log_file, tensorboard_folder, write_config
from core.checkpoints.position import Position
from core.checkpoints.resume import restore, state_of
from core.evaluation import Evaluation, Scorer
from core.logging import log, log_failure, log_stats, setup_logging
from core.memory import memory_warning
from core.meters import Clock, memory_mb
from core.optimizer import set_learning_rate
from core.precise_bn import update_precise_bn
from core.processes.distributed import (
    barrier,
    broadcast_from_main,
    gather_objects,
    is_main,
    rank,
    training_device,
    world_size,
)
from core.processes.faults import Faults
from core.processes.interrupt import Failed, Interrupted, Stopped
from core.processes.launch import restarts
from core.processes.progress import progress
from core.step import set_float32_precision
from core.summary import count_gflops, start_report


def train(cfg: CfgNode, score: Scorer | None = None) -> None:
    """Train in this process, one of `world_size()`. Raises `UserError` for the user's mistakes.

    Ends by SystemExit with code 128 + signal after SIGINT or SIGTERM, when the state is saved.
    """
    with folder_lock(cfg.OUT_DIR) if is_main() else contextlib.nullcontext(True) as locked:
        newest, notes = find_start(cfg)
        if not locked:
            notes.append(f"the file system of {cfg.OUT_DIR} has no locks: see to it yourself that one run uses it")
        torch.manual_seed(cfg.RNG_SEED)
        torch.backends.cudnn.benchmark = cfg.CUDNN.BENCHMARK
        set_float32_precision(cfg.TRAIN.PRECISION)
        run = Run(cfg, training_device(cfg.NUM_GPUS), score)
        if newest:
            notes += run.resume(newest)
        elif cfg.TRAIN.WEIGHTS:
            notes += run.load_initial_weights()
        barrier()  # nothing is written before all processes have found their input in order
        if is_main():
            remove_unfinished(cfg.OUT_DIR)
            write_config(cfg)
        setup_logging(log_file(cfg), dest=cfg.LOG_DEST, quiet=not is_main(), tensorboard=tensorboard_folder(cfg))
        for line in (*run.report(), *notes):
            log(line)
        try:
            run.train()
        except Exception as error:
            log_failure(error)
            raise


def find_start(cfg: CfgNode) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None to begin; and notes. The first process looks and tells the others."""
    newest, mistake = None, None
    notes: list[str] = []
    if is_main():
        try:
            newest, notes = newest_checkpoint(cfg.OUT_DIR)
        except ValueError as error:
            mistake = str(error)
    newest, notes, mistake = gather_objects((newest, notes, mistake))[0]
    if mistake:
        raise UserError(mistake)
    if newest and not cfg.TRAIN.AUTO_RESUME and not restarts():
        raise UserError(f"{cfg.OUT_DIR} holds checkpoints: set TRAIN.AUTO_RESUME True to go on, or another OUT_DIR")
    return newest, notes


class Run:
    """One training run: the model, its data, and how far it has come."""

    def __init__(self, cfg: CfgNode, device: torch.device, score: Scorer | None = None):
        self.cfg = cfg
        self.device = device
        self.train_loader = builders.build_train_loader(cfg)
        test_loader = builders.build_test_loader(cfg)
        self.iterations = self.train_loader.batch_sampler.per_epoch
        self.lists = builders.list_hashes(cfg)
        self.model = builders.build_classifier(cfg)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.frozen = builders.freeze(cfg, self.model)
        self.optimizer = builders.build_optimizer(cfg, self.model)
        self.average = MovingAverage(self.model, cfg.OPTIM.EMA_DECAY) if cfg.OPTIM.EMA_DECAY else None
        self.step = builders.build_step(cfg, self.model, self.optimizer)
        self.position = Position(device)
        self.saved_at: tuple[int, int] | None = None
        self.buckets_settled = False
        self.outdated: list[Path] = []  # checkpoints whose names tell of more iterations than are done
        self.evaluate = Evaluation(cfg, device, self.position, test_loader, score)
        self.faults = Faults(
            self.position,
            self.step,
            self.train_loader.dataset,
            skip_broken=cfg.DATA_LOADER.SKIP_BROKEN,
            remember=cfg.LOG_PERIOD,
            timeout=datetime.timedelta(seconds=cfg.DIST_TIMEOUT),
        )
        self.clock = Clock()

    @property
    def evaluated(self) -> builders.Classifier:
        """The network that is evaluated: the moving average where one is kept."""
        return self.average.network if self.average else self.model

    def load_initial_weights(self) -> list[str]:
        notes = builders.load_initial_weights(self.cfg, self.model)
        if self.average:
            self.average.network.load_state_dict(self.model.state_dict())
        return notes

    def resume(self, path: Path) -> list[str]:
        """Take up the state in a checkpoint; returns notes."""
        average = self.average.network if self.average else None
        notes = restore(
            path,
            self.cfg,
            self.model,
            self.optimizer,
            self.position,
            average=average,
            scaler=self.step.scaler,
            lists=self.lists,
            numbering=builders.trained_parameters,
        )
        if self.position.iteration > self.iterations:
            raise UserError(f"{path}: iteration {self.position.iteration} of an epoch that has {self.iterations}")
        if place_of(path) == self.position.place:
            self.saved_at = self.position.place
        elif is_main():  # with a larger batch fewer iterations are done: names of before would count as newer
            there = checkpoints(self.cfg.OUT_DIR)
            before = there[: there.index(path) + 1]
            self.outdated = [old for old in before if (place := place_of(old)) and place > self.position.place]
        done = f"{self.position.epochs_done} of {self.cfg.OPTIM.MAX_EPOCH} epochs done"
        inside = f" and {self.position.iteration} of {self.iterations} iterations of the next"
        return [f"resuming from {path}: {done}{inside if self.position.iteration else ''}", *notes]

    def report(self) -> list[str]:
        gflops = count_gflops(self.model.eval().descriptors, self.cfg.TRAIN.IM_SIZE, self.device)
        self.model.train()
        labels, test_loader = self.train_loader.dataset.labels, self.evaluate.loader
        validated = len(test_loader.dataset) if test_loader else 0
        report = start_report(self.cfg, self.model, self.device, gflops=gflops, labels=labels, validated=validated)
        return report + memory_warning(self.cfg, self.model, self.device)

    def train(self) -> None:
        with self.faults:
            try:
                self.train_epochs()
            except Interrupted as interrupted:
                path = self.save()
                log(f"{interrupted}: the same command goes on from {path}")
                raise Stopped(interrupted.number) from None
            except Failed as failed:
                if self.position.place != (0, 0):
                    log(f"the run ends, after the mend the same command goes on from {self.save()}")
                error = failed.error
            else:
                return
            raise error

    def train_epochs(self) -> None:
        cfg, position = self.cfg, self.position
        if cfg.OPTIM.MAX_EPOCH <= position.epochs_done:
            if position.epochs_done == 0:
                self.save()
            log(f"nothing to train: {position.epochs_done} of {cfg.OPTIM.MAX_EPOCH} epochs are done")
        while position.epochs_done < cfg.OPTIM.MAX_EPOCH:
            if position.iteration < self.iterations:  # else it was interrupted in the evaluation that follows
                self.train_epoch()
            number = position.epochs_done + 1
            evaluate = number % cfg.TRAIN.EVAL_PERIOD == 0 or number == cfg.OPTIM.MAX_EPOCH
            save = number % cfg.TRAIN.CHECKPOINT_PERIOD == 0 or number == cfg.OPTIM.MAX_EPOCH
            if evaluate or save:
                self.settle_batch_norm()
            best = evaluate and self.evaluate(self.evaluated, self.faults)
            position.next_epoch()
            if save:
                self.save(best=best)
            elif best:
                self.write(checkpoint_path(cfg.OUT_DIR, *position.place).with_name(BEST))
        self.faults.check_broken()

    def train_epoch(self) -> None:
        """From the position to the end of the epoch."""
        cfg, position = self.cfg, self.position
        self.train_loader.batch_sampler.set_epoch(position.epochs_done, start=position.iteration)
        self.model.train()
        self.frozen.keep_statistics()
        self.settle_buckets()
        clock, rate = Clock(), 0.0
        title = f"epoch {position.epochs_done + 1}/{cfg.OPTIM.MAX_EPOCH}"
        batches = self.faults.watched(builders.batches_on_device(self.train_loader, self.device))
        bar = progress(batches, title, unit="it", initial=position.iteration, total=self.iterations, leave=False)
        with contextlib.closing(bar):
            for batch in bar:
                self.faults.poll()
                rate = builders.learning_rate_at(cfg, position.epochs_done, position.iteration / self.iterations)
                set_learning_rate(self.optimizer, rate)
                update = position.epochs_done * self.iterations + position.iteration + 1
                self.faults.met(batch.broken, update, batch.indices.tolist())
                loss, ranks = self.step(batch.images, batch.labels, number=update, rank=rank())
                if self.average:
                    self.average.update(update)
                position.iteration += 1
                position.period.add(loss, ranks)
                clock.tick()
                self.clock.tick()
                log_now = position.iteration % cfg.LOG_PERIOD == 0 or position.iteration == self.iterations
                if log_now or self.device.type == "cpu":
                    self.faults.check_finite(self.iterations)
                if log_now:
                    stats = self.log_iteration(clock, rate)
                    bar.set_postfix(loss=f"{stats['loss']:.3f}", err=f"{stats['top1_err']:.1f}%")
                due = cfg.TRAIN.CHECKPOINT_ITERS and position.iteration % cfg.TRAIN.CHECKPOINT_ITERS == 0
                if due and position.iteration < self.iterations:
                    self.save()
        self.log_epoch(clock, rate)

    def settle_buckets(self) -> None:
        """Before the first update of this sitting, see `TrainStep.settle_buckets`."""
        if world_size() == 1 or self.buckets_settled:
            return
        part = self.cfg.TRAIN.BATCH_SIZE // world_size() // self.cfg.TRAIN.ACCUM_STEPS
        size = self.cfg.TRAIN.IM_SIZE
        images = torch.zeros(part, 3, size, size, device=self.device).contiguous(memory_format=torch.channels_last)
        self.step.settle_buckets(images, torch.zeros(part, dtype=torch.int64, device=self.device))
        self.buckets_settled = True

    def log_iteration(self, clock: Clock, rate: float) -> dict[str, float]:
        position, epochs = self.position, self.cfg.OPTIM.MAX_EPOCH
        stats = position.period.read()
        position.epoch.merge(position.period)
        position.period.reset()
        log_stats(
            "train_iter",
            epoch=f"{position.epochs_done + 1}/{epochs}",
            iter=f"{position.iteration}/{self.iterations}",
            **self.speed(clock),
            eta=self.clock.eta((epochs - position.epochs_done) * self.iterations - position.iteration),
            lr=rate,
            **stats,
        )
        return stats

    def log_epoch(self, clock: Clock, rate: float) -> None:
        position, epochs = self.position, self.cfg.OPTIM.MAX_EPOCH
        log_stats(
            "train_epoch",
            epoch=f"{position.epochs_done + 1}/{epochs}",
            **self.speed(clock),
            eta=self.clock.eta((epochs - position.epochs_done - 1) * self.iterations),
            lr=rate,
            **position.epoch.read(),
        )

    def speed(self, clock: Clock) -> dict[str, float | int]:
        per_second = self.cfg.TRAIN.BATCH_SIZE / max(clock.per_iteration, 1e-9)
        return {"time_avg": clock.per_iteration, "images_per_s": per_second, "mem": memory_mb(self.device)}

    def settle_batch_norm(self) -> None:
        """Give all processes the same batch-norm statistics: what is evaluated is what is saved."""
        cfg = self.cfg
        if cfg.BN.USE_PRECISE_STATS:
            batches = max(cfg.BN.NUM_SAMPLES_PRECISE // cfg.TRAIN.BATCH_SIZE, 1)
            self.train_loader.batch_sampler.set_epoch(self.position.epochs_done)
            loader = builders.batches_on_device(self.train_loader, self.device)
            network = self.evaluated
            still = builders.freeze(cfg, network).layers
            update_precise_bn(
                network,
                loader,
                batches=batches,
                forward=network.descriptors,
                leave=still,
                watch=self.faults.watched,
                poll=self.faults.poll,
            )
        elif world_size() > 1:
            broadcast_from_main(self.model.buffers())
            if self.average:
                broadcast_from_main(self.average.network.buffers())

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of this position, unless it has been written; a collective call."""
        cfg, position = self.cfg, self.position
        path = checkpoint_path(cfg.OUT_DIR, *position.place)
        if self.saved_at == position.place:
            return path
        self.write(path)
        self.saved_at = position.place
        if is_main():
            while self.outdated:
                self.outdated.pop().unlink(missing_ok=True)
            if best:
                link_best(path)
            prune(cfg.OUT_DIR, cfg.TRAIN.KEEP_CHECKPOINTS)
        return path

    def write(self, path: Path) -> None:
        """Write the whole state to a file; a collective call, which ends when the file is on the disk."""
        self.faults.check_finite(self.iterations)
        self.faults.count_broken()
        average = self.average.network if self.average else None
        scaler = self.step.scaler.state_dict()
        content = state_of(
            self.cfg, self.model, self.optimizer, self.position, average=average, scaler=scaler, lists=self.lists
        )
        for key, value in content["model_state"].items():
            if value is not None and value.is_floating_point() and not value.isfinite().all():
                # Such a file could not be loaded again.
                done = self.position.epochs_done
                raise FloatingPointError(f"{key} is not finite after epoch {done}: lower OPTIM.BASE_LR")
        if is_main():
            write_checkpoint(content, path)
            log(f"saved {path}")
        barrier()
