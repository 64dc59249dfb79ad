"""Training: set up, then epochs of steps, validation and checkpoints."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from yacs.config import CfgNode

from core import builders
from core.checkpoint import newest_checkpoint, resume, save_checkpoint
from core.distributed import barrier, broadcast_from_main, is_main, training_device, world_size
from core.environment import code_version
from core.logging import log, log_stats, setup_logging
from core.meters import Clock, Sums, memory_mb
from core.optimizer import set_learning_rate
from core.output import log_file, write_config
from core.precise_bn import update_precise_bn
from core.progress import progress


def train(cfg: CfgNode) -> None:
    """Train in this process, one of `world_size()`. Raises `ValueError` for the user's mistakes."""
    newest = newest_checkpoint(cfg.OUT_DIR)
    if newest and not cfg.TRAIN.AUTO_RESUME:
        raise ValueError(f"{cfg.OUT_DIR} holds checkpoints: set TRAIN.AUTO_RESUME True to go on, or another OUT_DIR")
    torch.manual_seed(cfg.RNG_SEED)
    torch.backends.cudnn.benchmark = cfg.CUDNN.BENCHMARK
    run = Run(cfg, training_device(cfg.NUM_GPUS))
    notes = []
    if newest:
        run.epochs_done = resume(newest, run.model, run.optimizer)
        notes.append(f"resuming from {newest}: {run.epochs_done} of {cfg.OPTIM.MAX_EPOCH} epochs done")
    elif cfg.TRAIN.WEIGHTS:
        notes = builders.load_initial_weights(cfg, run.model)
    barrier()  # nothing is written before all processes have found their input in order
    if is_main():
        write_config(cfg)
    setup_logging(log_file(cfg), quiet=not is_main())
    run.log_start()
    for note in notes:
        log(note)
    run.train()


def train_step(network: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One update of the weights; returns the loss and the logits [B, classes] from before it."""
    logits = network(images, labels)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


class Run:
    """One training run: the model, its data, and how far it has come."""

    def __init__(self, cfg: CfgNode, device: torch.device):
        self.cfg = cfg
        self.device = device
        self.train_loader = builders.build_train_loader(cfg)
        self.test_loader = builders.build_test_loader(cfg)
        self.model = builders.build_classifier(cfg).to(device, memory_format=torch.channels_last)
        self.optimizer = builders.build_optimizer(cfg, self.model)
        self.epochs_done = 0
        self.lowest_error = math.inf

    def log_start(self) -> None:
        cfg, labels = self.cfg, self.train_loader.dataset.labels
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        parameters = sum(p.numel() for p in self.model.parameters())
        log(f"code {code_version()}, torch {torch.__version__}, {world_size()} x {name}")
        log(f"ResNet-{cfg.MODEL.DEPTH}, {parameters / 1e6:.2f} million parameters, {cfg.MODEL.HEADS.CLS_LAYER} head")
        validated = f"{len(self.test_loader.dataset)} to validate" if self.test_loader else "no validation"
        log(
            f"{len(labels)} images of {len(np.unique(labels))} classes to train, {validated}; "
            f"{len(self.train_loader)} iterations of {cfg.TRAIN.BATCH_SIZE} images an epoch"
        )

    def train(self) -> None:
        cfg = self.cfg
        network = self.model
        if world_size() > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(self.model, device_ids=devices)
        if cfg.OPTIM.MAX_EPOCH <= self.epochs_done:
            if self.epochs_done == 0:
                self.save()
            log(f"nothing to train: {self.epochs_done} of {cfg.OPTIM.MAX_EPOCH} epochs are done")
        self.clock = Clock()
        while self.epochs_done < cfg.OPTIM.MAX_EPOCH:
            self.train_epoch(network)
            self.epochs_done += 1
            validate = self.test_loader is not None and self.is_due(cfg.TRAIN.EVAL_PERIOD)
            save = self.is_due(cfg.TRAIN.CHECKPOINT_PERIOD)
            if validate or save:
                self.settle_batch_norm()
            if validate:
                self.validate()
            if save:
                self.save()

    def is_due(self, period: int) -> bool:
        return self.epochs_done % period == 0 or self.epochs_done == self.cfg.OPTIM.MAX_EPOCH

    def save(self) -> None:
        for key, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():  # such a file could not be loaded again
                raise FloatingPointError(f"{key} is not finite after epoch {self.epochs_done}: lower OPTIM.BASE_LR")
        if is_main():
            path = save_checkpoint(self.cfg, self.model, self.optimizer, epochs_done=self.epochs_done)
            log(f"saved {path}")
        barrier()

    def train_epoch(self, network: nn.Module) -> None:
        cfg, epoch, iterations = self.cfg, self.epochs_done, len(self.train_loader)
        rate = builders.learning_rate_at(cfg, epoch)
        set_learning_rate(self.optimizer, rate)
        self.train_loader.batch_sampler.set_epoch(epoch)
        self.model.train()
        whole, recent = Sums(self.device), Sums(self.device)
        clock = Clock()
        title = f"epoch {epoch + 1}/{cfg.OPTIM.MAX_EPOCH}"
        bar = progress(self.train_loader, title, unit="it", leave=False)
        for iteration, (images, labels, _) in enumerate(bar, start=1):
            images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(self.device, non_blocking=True)
            loss, logits = train_step(network, self.optimizer, images, labels)
            whole.add(loss, logits, labels)
            recent.add(loss, logits, labels)
            clock.tick()
            self.clock.tick()
            if iteration % cfg.LOG_PERIOD == 0 or iteration == iterations:
                stats = self.finite(recent, f"epoch {epoch + 1}, iteration {iteration}")
                recent.reset()
                bar.set_postfix(loss=f"{stats['loss']:.3f}", err=f"{stats['top1_err']:.1f}%")
                left = (cfg.OPTIM.MAX_EPOCH - epoch) * iterations - iteration
                log_stats(
                    "train_iter",
                    epoch=f"{epoch + 1}/{cfg.OPTIM.MAX_EPOCH}",
                    iter=f"{iteration}/{iterations}",
                    **self.speed(clock),
                    eta=self.clock.eta(left),
                    lr=rate,
                    **stats,
                )
        stats = self.finite(whole, f"epoch {epoch + 1}")
        log_stats(
            "train_epoch",
            epoch=f"{epoch + 1}/{cfg.OPTIM.MAX_EPOCH}",
            **self.speed(clock),
            eta=self.clock.eta((cfg.OPTIM.MAX_EPOCH - epoch - 1) * iterations),
            lr=rate,
            **stats,
        )

    def finite(self, sums: Sums, where: str) -> dict[str, float]:
        """The means of `sums`; a loss that is not finite ends the run before anything of it is saved."""
        stats = sums.read()
        if not math.isfinite(stats["loss"]):
            raise FloatingPointError(f"the loss is {stats['loss']} at {where}: lower OPTIM.BASE_LR, or warm up longer")
        return stats

    def speed(self, clock: Clock) -> dict[str, float | int]:
        per_second = self.cfg.TRAIN.BATCH_SIZE / max(clock.per_iteration, 1e-9)
        return {"time_avg": clock.per_iteration, "images_per_s": per_second, "mem": memory_mb(self.device)}

    def settle_batch_norm(self) -> None:
        """Give all processes the same batch-norm statistics: what is validated is what is saved."""
        if self.cfg.BN.USE_PRECISE_STATS:
            batches = self.cfg.BN.NUM_SAMPLES_PRECISE // self.cfg.TRAIN.BATCH_SIZE
            update_precise_bn(self.model, self.train_loader, self.device, batches=batches)
        else:
            broadcast_from_main(self.model.buffers())

    @torch.no_grad()
    def validate(self) -> None:
        """Log loss and errors over every image of the list exactly once, from plain cosines."""
        self.model.eval()
        sums = Sums(self.device)
        with progress(self.test_loader, "validation", unit="batch", leave=False) as bar:
            for images, labels, _ in bar:
                labels = labels.to(self.device)
                logits = self.model(images.to(self.device, memory_format=torch.channels_last))
                sums.add(F.cross_entropy(logits, labels), logits, labels)
        stats = sums.read()  # may overflow in the first epochs, whose batch-norm statistics are half those of the start
        self.lowest_error = min(self.lowest_error, stats["top1_err"])
        log_stats(
            "test_epoch",
            epoch=f"{self.epochs_done}/{self.cfg.OPTIM.MAX_EPOCH}",
            min_top1_err=self.lowest_error,
            mem=memory_mb(self.device),
            **stats,
        )
