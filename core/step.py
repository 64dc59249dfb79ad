"""One update of the weights: precision, accumulation, clipping, and the guard against losses that are not finite."""

import contextlib
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from core.processes.distributed import all_reduce_max, all_reduce_sum

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A float16 gradient that overflows with the loss scaled by so little is not saved by scaling it less.
SMALLEST_SCALE = 1e-3


def set_float32_precision(precision: str) -> None:
    """Let GPUs round the inputs of float32 products to TF32 (10 bits), or not."""
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class TrainStep:
    """Forward, backward and update for this process's share of a batch.

    `network(images, labels)` returns (mean loss, ranks [B]), see `model.classifier`. Nothing here waits for a GPU:
    whether loss and gradients are finite is kept on the device, in `first_bad`, and the update is left out there from
    the first that are not. On the CPU, where looking costs nothing, the caller may look after every step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        clip: float = 0.0,
        sharded: Collection[nn.Parameter] = (),
    ):
        """`sharded`: parameters of which every process holds another part."""
        self.network = network
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = {id(p) for p in sharded}
        self.device = self.parameters[0].device
        self.look = self.device.type == "cpu"  # where that costs nothing
        self.autocast = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.accumulate = accumulate
        self.clip = clip
        # number of the first step with a bad loss (plus its process) or gradient: [step, process + 1 or 0]
        self.first_bad = torch.zeros(2, dtype=torch.int64, device=self.device)

    def __call__(self, images: Tensor, labels: Tensor, *, number: int = 1, rank: int = 0) -> tuple[Tensor, Tensor]:
        """One update; returns the mean loss and the ranks [B] from before it.

        `number` (from 1) is what `first_bad` calls this step, `rank` what it calls this process.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses, ranks = [], []
        parts = list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))
        for part, (part_images, part_labels) in enumerate(parts, start=1):
            with self._without_exchange() if part < len(parts) else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    loss, part_ranks = self.network(part_images, part_labels)
                share = len(part_labels) / len(labels)
                self.scaler.scale(loss * share if len(parts) > 1 else loss).backward()
            losses.append(loss.detach() * share)
            ranks.append(part_ranks)
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        self._update(loss, number, rank)
        return loss, torch.cat(ranks) if len(ranks) > 1 else ranks[0]

    def settle_buckets(self, images: Tensor, labels: Tensor) -> None:
        """Let DistributedDataParallel make its final buckets of gradients before the first update.

        It lays them out anew after its first backward pass (with a static graph after its second), by the order in
        which gradients came. From three processes on, the place of a gradient in its bucket decides in which order the
        values of the processes are added, and so how they are rounded: a run that goes on from a checkpoint would
        differ in its first steps from one that was never stopped. Passes ahead, of no consequence, give every step the
        same buckets. A collective call, in training mode; `images` and `labels` are a part of a batch in shape, type
        and layout.
        """
        before = [buffer.clone() for buffer in self.network.buffers()]
        for _ in range(2):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss, _ = self.network(images, labels)
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.network.buffers(), before, strict=True):
            buffer.detach().copy_(value)

    def _without_exchange(self) -> contextlib.AbstractContextManager:
        # torch.compile hides the type of what it wraps, not its methods.
        no_sync = getattr(self.network, "no_sync", contextlib.nullcontext)
        return no_sync()

    def _update(self, loss: Tensor, number: int, rank: int) -> None:
        self.scaler.unscale_(self.optimizer)
        norm, overflow = self._gradient_norm(), self._overflow()
        bad_loss, bad_norm = ~loss.isfinite(), ~norm.isfinite() & ~overflow
        faults = all_reduce_max(torch.stack([(bad_loss | bad_norm).long(), bad_loss.long() * (rank + 1)]))
        now = torch.stack([faults[0] * number, faults[1]])
        self.first_bad = torch.where(self.first_bad[0] > 0, self.first_bad, now)
        if self.clip:
            clip_grads_with_norm_(self.parameters, self.clip, norm, foreach=True)
        self._step_unless((self.first_bad[0] > 0) | overflow)
        self.scaler.update()

    def _step_unless(self, left_out: Tensor) -> None:
        """Let the optimizer step unless `left_out` (bool []), without waiting for a GPU to tell.

        Not by `GradScaler.step`, which knows of its own overflows only and not of what came before.
        """
        if self.look:
            if not left_out:
                self.optimizer.step()
            return
        # Fused optimisers leave the update out on the device where this is 1 (it is GradScaler's way of telling).
        vars(self.optimizer).update(grad_scale=None, found_inf=left_out.float())
        self.optimizer.step()

    def _overflow(self) -> Tensor:
        """Whether float16 gradients have overflowed (bool []): that costs one update, and scales the next loss less."""
        if not self.scaler.is_enabled():
            return torch.zeros((), dtype=torch.bool, device=self.device)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return ~get_total_norm(gradients, norm_type=torch.inf, foreach=True).isfinite()

    def _gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient, over all processes where parameters are sharded."""
        with_gradient = [p for p in self.parameters if p.grad is not None]
        common = get_total_norm([p.grad for p in with_gradient if id(p) not in self.sharded], foreach=True)
        if not self.sharded:
            return common
        shard_norm = get_total_norm([p.grad for p in with_gradient if id(p) in self.sharded], foreach=True)
        return (common.square() + all_reduce_sum(shard_norm.square())).sqrt()
