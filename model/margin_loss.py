"""Cross-entropy over the cosines to all classes, with a margin, in two passes over the class matrix.

The matrix is far larger than everything else (81,313 x 512 floats: 166 MB), so what counts is how often it is read and
written: here once for the forward pass, and once read and its gradient once written for the backward pass. Neither a
normalised copy of it nor the logits' softmax is kept twice. On the CPU all of it goes block by block, so that what a
block needs stays in the cache; masks are floats there, because comparisons that give booleans are ten times slower.
Cosines lie as [classes, B]: a block is then contiguous, and the matrix products are faster.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.sharded import Shards

EPSILON = 1e-12  # of F.normalize
CPU_BLOCK = 8192  # classes: 16 MB of 512 floats stay in the last cache; smaller blocks pay more for waking threads
GPU_BLOCK = 1 << 17  # bounds the temporary memory; floats count exactly up to 1 << 24


class Margin(Protocol):
    """What a head makes of the cosines of a batch."""

    def target(self, cos_y: Tensor) -> tuple[Tensor, Tensor]:
        """cos(theta_y) [B] -> the threshold for hard negatives [B], and the target that stands for cos_y [B]."""

    def negatives(self, cosines: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cosines [n, B] of other classes -> the values that stand for them, and the slopes (None: all are 1).

        Both may be overwritten by the caller; neither is `cosines` itself.
        """


class NoMargin:
    """Plain cosines, as validation needs them."""

    def target(self, cos_y: Tensor) -> tuple[Tensor, Tensor]:
        return cos_y, cos_y

    def negatives(self, cosines: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor | None]:
        return cosines.clone(), None


def margin_cross_entropy(
    descriptors: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: Margin, shards: Shards | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the scaled logits, and by how many classes the true one is beaten.

    descriptors [B, D], weight [classes, D], labels [B] -> loss [], ranks int64 [B]. A class beats the true one with a
    greater logit, or with an equal one and a smaller index; a true logit that is not a number is beaten by all. With
    `shards` of several processes, weight holds this rank's classes, B is equal on all ranks, and labels count over all
    classes. Then each rank gets the loss and ranks of its own batch; the gradient of `descriptors` is that of this
    loss, as DDP expects it, while `weight` gets that of the mean over all ranks. Float32 at least, whatever autocast
    says.
    """
    if torch.compiler.is_compiling():  # of the network around it; there is nothing to fuse in here
        return torch.compiler.disable(margin_cross_entropy)(
            descriptors, weight, labels, scale=scale, margin=margin, shards=shards
        )
    at_least_float32 = torch.promote_types(torch.promote_types(descriptors.dtype, weight.dtype), torch.float32)
    shards = shards or Shards(len(weight))
    with torch.autocast(descriptors.device.type, enabled=False):
        descriptors, weight = descriptors.to(at_least_float32), weight.to(at_least_float32)
        trains = torch.is_grad_enabled() and (descriptors.requires_grad or weight.requires_grad)
        return _MarginCrossEntropy.apply(descriptors, weight, labels, scale, margin, shards, trains)


def cosine_loss(descriptors: Tensor, weight: Tensor, labels: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `margin_cross_entropy`, over plain cosines: needs no other process."""
    return margin_cross_entropy(descriptors, weight, labels, scale=scale, margin=NoMargin())


class _MarginCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, descriptors, weight, labels, scale, margin, shards, trains):
        x, labels = shards.join(descriptors), shards.join(labels)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(EPSILON)
        x = x / norm
        labels = labels - shards.bounds[0]  # outside of 0..rows - 1 where another rank holds the class

        cosines, inverse = x.new_empty(len(weight), len(x)), x.new_empty(len(weight), 1)
        for block in _blocks(weight):
            torch.linalg.vector_norm(weight[block], dim=1, keepdim=True, out=inverse[block])
            inverse[block].clamp_min_(EPSILON).reciprocal_()
            torch.mm(weight[block], x.T, out=cosines[block])
            cosines[block].mul_(inverse[block]).clamp_(-1.0, 1.0)

        cos_y = shards.sum(_pick(cosines, labels))
        with torch.set_grad_enabled(trains):
            threshold, target = margin.target(cos_y.requires_grad_(trains))
            target_slope = torch.autograd.grad(target.sum(), cos_y)[0] if trains else None
        threshold, target = threshold.detach(), target.detach()

        # The softmax without the true class: exponentials relative to their block's largest logit. They are
        # multiplied by the slope right away, because nothing else is needed for the gradient.
        exponentials = torch.empty_like(cosines) if trains else cosines
        largest, sums, not_beating = [], [], 0
        for block in _blocks(weight):
            logits, slopes = margin.negatives(cosines[block], threshold)
            local = labels - block.start
            _place(logits, local, torch.full_like(target, -torch.inf))
            not_beating = not_beating + _count_not_beating(logits, target, local)
            logits *= scale
            largest.append(logits.amax(0).clamp_min(torch.finfo(logits.dtype).min))  # finite without any other class
            torch.exp(logits.sub_(largest[-1]), out=exponentials[block])
            sums.append(exponentials[block].sum(0))
            if trains and slopes is not None:
                exponentials[block].mul_(slopes)
        largest, sums = torch.stack(largest), torch.stack(sums)
        top = shards.max(largest.amax(0))
        others = top + shards.sum((sums * (largest - top).exp()).sum(0)).log()
        true = scale * target
        everything = torch.logaddexp(others, true)
        ranks = shards.num_classes - shards.sum(not_beating)

        loss = shards.own(torch.logaddexp(others - true, torch.zeros_like(true))).mean()
        ranks = shards.own(ranks)
        ctx.mark_non_differentiable(ranks)
        if trains:
            factors = (largest - everything).exp() * scale  # [blocks, B]
            true_factor = -(others - everything).exp() * scale * target_slope
            ctx.save_for_backward(weight, labels, x, norm, inverse, cosines, exponentials, factors, true_factor)
            ctx.shards = shards
        return loss, ranks

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        weight, labels, x, norm, inverse, cosines, exponentials, factors, true_factor = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        upstream = upstream / len(x)
        factors, true_factor = factors * upstream, true_factor * upstream
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_x = torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for block, factor in zip(_blocks(weight), factors, strict=True):
                by_cosine = exponentials[block] * factor  # [n, B], without the true class
                by_product = by_cosine * inverse[block]
                if wants_x:
                    grad_x.addmm_(by_product.T, weight[block])
                if wants_weight:
                    local = labels - block.start
                    _place(by_product, local, true_factor * _pick(inverse[block], local))
                    # d cos / d w = x / |w| - cos w / |w|^2
                    radial = torch.linalg.vecdot(by_product, cosines[block])[:, None] * -inverse[block]
                    torch.mul(weight[block], radial, out=grad_weight[block])
                    grad_weight[block].addmm_(by_product, x)
            if wants_x:
                # The true class comes last: added in between, it would make all later sums round to its size.
                true_row = weight[labels.clamp(0, len(weight) - 1)]
                grad_x.addcmul_(true_row, (true_factor * _pick(inverse, labels))[:, None])
                shards = ctx.shards
                grad_x, x, norm = (shards.own(value) for value in (shards.sum(grad_x), x, norm))
                grad_x = (grad_x - torch.linalg.vecdot(grad_x, x)[:, None] * x) * (shards.world / norm)
        return grad_x if wants_x else None, grad_weight, None, None, None, None, None


def _blocks(weight: Tensor) -> Iterator[slice]:
    step = CPU_BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def _pick(block: Tensor, rows: Tensor) -> Tensor:
    """block[rows[b], b] [B], and 0 where the row lies outside of the block [n, B or 1]."""
    inside, rows = (rows >= 0) & (rows < len(block)), rows.clamp(0, len(block) - 1)[None]
    return torch.where(inside, block.expand(-1, len(inside)).gather(0, rows)[0], 0.0)


def _place(block: Tensor, rows: Tensor, values: Tensor) -> None:
    """block[rows[b], b] = values[b], wherever the row lies within the block [n, B]."""
    inside, rows = (rows >= 0) & (rows < len(block)), rows.clamp(0, len(block) - 1)[None]
    block.scatter_(0, rows, torch.where(inside, values, block.gather(0, rows)))


def _count_not_beating(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """How many of the classes [n, B] are below the target [B], or equal to it and not before `rows` [B]: int64 [B]."""
    index = torch.arange(len(logits), dtype=logits.dtype, device=logits.device)[:, None]
    below, equal, after = (torch.empty_like(logits) for _ in range(3))
    torch.lt(logits, target, out=below)
    torch.eq(logits, target, out=equal)
    torch.ge(index, rows.to(logits.dtype), out=after)
    return below.addcmul_(equal, after).sum(0).long()
