"""How much memory a run will need, estimated before its first step, against what the machine has."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode

from core import builders
from core.processes.distributed import world_size
from core.step import AUTOCAST

FLOAT = 4  # bytes
# Scratch memory of oneDNN, and what malloc keeps, came to 14 and 15 % more than is counted here in two of four runs
# (ResNet-50, 224 px, batch 8; ResNet-18, 128 px, batch 16), to 3 % or less in the others.
MARGIN = 1.2
# A bound for any of the networks, so that small runs need no estimate, which takes seconds: a ResNet-50 in float32
# takes 1,950 bytes a pixel of a batch.
MOST_BYTES_A_PIXEL = 6000


class Estimate(NamedTuple):
    """Bytes that one process will take: all of its own, and at the peak of a step or of validation."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    validation: int

    @property
    def total(self) -> int:
        training = self.gradients + self.activations
        return self.weights + self.optimizer + self.average + max(training, self.validation)


class _Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are made within, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def free(_: weakref.ref) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, free)
        self.now += size
        self.most = max(self.most, self.now)


def estimate(cfg: CfgNode, model: builders.Classifier) -> Estimate:
    """For this process of the run, whose network is `model`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    share = -(-cfg.TRAIN.BATCH_SIZE // world_size() // cfg.TRAIN.ACCUM_STEPS)
    head = model.desc_cls
    rows, every = head.weight.shape[0], share * (world_size() if cfg.MODEL.HEADS.SHARDED else 1)
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    gradients = sum(p.nbytes for p in trained)
    states = 2 if cfg.OPTIM.OPTIMIZER == "adamw" else int(cfg.OPTIM.MOMENTUM > 0)
    tested = -(-cfg.TEST.BATCH_SIZE // world_size()) if cfg.TEST.SPLIT else 0
    logits = rows * FLOAT * every
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=states * gradients,
        average=weights if cfg.OPTIM.EMA_DECAY else 0,
        activations=_network_peak(cfg, share, train=True) + 2 * logits,  # cosines and exponentials
        validation=_network_peak(cfg, tested, train=False) + rows * FLOAT * tested if tested else 0,
    )


def _network_peak(cfg: CfgNode, batch: int, *, train: bool) -> int:
    """Bytes that forward and backward take at once for `batch` images, without weights and their gradients.

    Nothing is computed: only shapes go through the network.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to load, and few runs need an estimate

    size, autocast = cfg.TRAIN.IM_SIZE, AUTOCAST.get(cfg.TRAIN.PRECISION) if train else None
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        model = builders.build_descriptor(cfg).train(train)
        builders.freeze(cfg, model).keep_statistics()
        images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # so that theirs are not counted
        stack.enter_context(torch.set_grad_enabled(train))
        peak = stack.enter_context(_Peak())
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            descriptors = model(images)
        if descriptors.requires_grad:
            descriptors.float().sum().backward()
        return peak.most + 2 * images.nbytes  # this batch and the next


def memory_warning(cfg: CfgNode, model: builders.Classifier, device: torch.device) -> list[str]:
    """A line if a run of `model` would take more memory than the machine has; it is for the user to decide.

    With `MARGIN` the estimate lay 5 to 37 % above what four short runs took on a CPU. Loader workers are not counted,
    nor are other programs, which come and go: nothing is refused.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if device.type == "cpu" else 1
    free = available(device) // local
    held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    images = max(cfg.TRAIN.BATCH_SIZE // cfg.TRAIN.ACCUM_STEPS, cfg.TEST.BATCH_SIZE if cfg.TEST.SPLIT else 0)
    logits = 2 * FLOAT * cfg.TRAIN.BATCH_SIZE * cfg.MODEL.NUM_CLASSES
    if images * cfg.TRAIN.IM_SIZE**2 * MOST_BYTES_A_PIXEL // world_size() + 5 * held + logits < free:
        return []
    need = estimate(cfg, model)
    missing = round(MARGIN * (need.total - need.weights - need.average))  # those are held already
    if missing <= free:
        return []
    if need.validation > need.gradients + need.activations:
        mend = "lower TEST.BATCH_SIZE"
    else:
        mend = "lower TRAIN.BATCH_SIZE or TRAIN.IM_SIZE, raise TRAIN.ACCUM_STEPS, or set TRAIN.PRECISION bf16"
    sizes = {name: size for name, size in need._asdict().items() if size and name not in ("weights", "average")}
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    where = "of the GPU" if device.type == "cuda" else "of this machine"
    each = f" for each of {local}" if local > 1 else ""
    return [
        f"warning: a process will need about {missing / 1e9:.1f} GB more than it has ({parts}, and a margin) "
        f"and {free / 1e9:.1f} GB {where}{each} are free: the system may end the run. {mend[0].upper()}{mend[1:]}"
    ]


def available(device: torch.device) -> int:
    """Bytes that this process can still take: of the GPU, or of the machine within its control groups."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(min([_free_of_machine(), *_free_of_groups()]), 0)


def _free_of_machine(path: Path = Path("/proc/meminfo")) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62


def _free_of_groups(root: Path = Path("/")) -> Iterator[int]:
    """What the limits of this process's control groups leave, version 1 and 2, from its own group up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield from _free_of_group(folder, *names)


def _free_of_group(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    """A limit of `max` and a file that is absent or odd tell of none."""
    with contextlib.suppress(OSError, ValueError):
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield most - used + int(statistics.get(cached, 0))  # files in the cache give way
