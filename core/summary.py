"""What is said of a run before it starts: devices, batch, network, data."""

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from core.base.version import code_version
from core.processes.distributed import world_size

# Batch and rate of the recipes that are known to train: the published YAML, and the paper's section 4.1.
KNOWN_RATES = ((64, 0.01), (128, 0.05))
UNUSUAL = 4.0  # this many times above or below the rates that are known, scaled with the batch


def start_report(
    cfg: CfgNode, model: nn.Module, device: torch.device, *, gflops: float, labels: np.ndarray, validated: int
) -> list[str]:
    """The lines; the last is a warning where something looks like an oversight."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    world, batch = world_size(), cfg.TRAIN.BATCH_SIZE
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    still = f" ({trained / 1e6:.2f} trained)" if trained < parameters else ""
    parts = f" in {cfg.TRAIN.ACCUM_STEPS} parts" if cfg.TRAIN.ACCUM_STEPS > 1 else ""
    counts = np.bincount(labels, minlength=cfg.MODEL.NUM_CLASSES)
    present = counts[counts > 0]
    lines = [
        f"code {code_version()}, torch {torch.__version__}, {world} x {kind}, {cfg.TRAIN.PRECISION}"
        + (", compiled" if cfg.TRAIN.COMPILE else ""),
        f"ResNet-{cfg.MODEL.DEPTH}, {parameters / 1e6:.2f} million parameters{still}, "
        f"{gflops:.2f} GFLOPs (2 a multiply-add) for the descriptor of {cfg.TRAIN.IM_SIZE} x {cfg.TRAIN.IM_SIZE} px, "
        f"{cfg.MODEL.HEADS.CLS_LAYER} head",
        f"{len(labels)} images of {len(present)} classes to train, "
        + (f"{validated} to validate; " if validated else "no validation; ")
        + f"{len(labels) // batch} iterations of {batch} images an epoch ({batch // world} a process{parts})",
        f"images a class: {present.min()} to {present.max()}, median {np.median(present):g}; "
        f"{np.count_nonzero(counts == 0)} of {cfg.MODEL.NUM_CLASSES} classes without images, "
        f"{np.count_nonzero(counts == 1)} with one",
    ]
    return lines + rate_warning(cfg)


def rate_warning(cfg: CfgNode) -> list[str]:
    """A line if the rate is far from those of known recipes, scaled linearly to this batch."""
    if cfg.OPTIM.OPTIMIZER != "sgd" or cfg.OPTIM.BASE_LR == 0:
        return []
    usual = [rate * cfg.TRAIN.BATCH_SIZE / batch for batch, rate in KNOWN_RATES]
    if min(usual) / UNUSUAL <= cfg.OPTIM.BASE_LR <= max(usual) * UNUSUAL:
        return []
    return [
        f"warning: OPTIM.BASE_LR {cfg.OPTIM.BASE_LR:g} is unusual for TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE}: known "
        f"recipes scale to {min(usual):.3g} .. {max(usual):.3g} (Goyal et al., arXiv:1706.02677, section 2.1)"
    ]


def count_gflops(descriptor: nn.Module, size: int) -> float:
    """Billions of operations, two a multiply-add, for one image's descriptor; counted without computing it.

    `descriptor` lies on the device `meta`.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        descriptor.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9
