"""What is said of a run before it starts: devices, batch, network, data."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from yacs.config import CfgNode

from core.base.version import code_version
from core.processes.distributed import world_size
from model.backbones import BACKBONES

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
        f"{BACKBONES[cfg.MODEL.TYPE].title}-{cfg.MODEL.DEPTH}, {parameters / 1e6:.2f} million parameters{still}, "
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


class _Operations(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode` does; convolutions are not computed, their results are zeros.

    That mode, and the device `meta`, would import torch's compiler, which takes seconds of every start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under this mode

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation, kwargs = function.overloadpacket, kwargs or {}
        convolves = operation is torch.ops.aten.convolution
        result = _convolution_of_zeros(*args) if convolves else function(*args, **kwargs)
        if operation in flop_registry:
            self.count += flop_registry[operation](*args, **kwargs, out_val=result)
        return result


def _convolution_of_zeros(x, weight, bias, stride, padding, dilation, transposed, *_) -> Tensor:
    assert not transposed
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    return x.new_zeros(x.shape[0], weight.shape[0], *sizes)


def count_gflops(descriptor: Callable[[Tensor], Tensor], size: int, device: torch.device | str) -> float:
    """Billions of operations, two a multiply-add, for one image's descriptor, by a network that does not train."""
    with torch.no_grad(), _Operations() as operations:
        descriptor(torch.zeros(1, 3, size, size, device=device))
    return operations.count / 1e9
