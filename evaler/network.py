"""From weights and a configuration to a network that is ready to describe, and the provenance of what it gives.

Every descriptor of `evaler` comes from here. What all of PyTorch shares (threads, TF32, the current GPU) is left as it
is: a program that loads a network keeps its own settings. A command calls `claim_process` in its `main`.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from core.base.download import local_path
from core.base.files import sha256_file
from core.base.version import code_version
from core.builders import build_descriptor, load_tested_weights
from core.checkpoints.saved_settings import network_settings, read_saved
from core.config import get_cfg, load_cfg
from core.processes.place import device_index, place
from evaler.features.provenance import Provenance
from model.dolg import DOLG
from model.inference import for_inference
from model.weights.loading import architecture, normalise_names, read_checkpoint

GPU_BATCH_SIZE = 8  # where the configuration leaves it open


@dataclass(frozen=True, eq=False)
class Network:
    """plain: with its weights, in eval mode; weights: the file; notes: what of it was loaded."""

    cfg: CfgNode
    plain: DOLG
    device: torch.device
    weights: Path
    notes: tuple[str, ...]

    def arranged(self, *, precision: str | None = None, compiled: bool | None = None) -> nn.Module:
        """The fast form, `model.inference.for_inference`; INFER.PRECISION and INFER.COMPILE where none is given."""
        infer = self.cfg.INFER
        compiled = infer.COMPILE if compiled is None else compiled
        return for_inference(self.plain, precision=precision or infer.PRECISION, compiled=compiled)

    @cached_property
    def provenance(self) -> Provenance:
        """Of what the configuration makes with it, but for the list of images."""
        cfg, gpu = self.cfg, self.device.type == "cuda"
        batch_size = batch_size_of(cfg, gpu=gpu)
        return Provenance(
            weights=str(self.weights),
            weights_sha256=sha256_file(self.weights),
            backbone=None if cfg.MODEL.TYPE == "resnet" else cfg.MODEL.TYPE,
            depth=cfg.MODEL.DEPTH,
            with_ma=cfg.MODEL.WITH_MA,
            fusion=cfg.MODEL.FUSION,
            stride_1x1=cfg.RESNET.STRIDE_1X1,
            bn_eps=cfg.BN.EPS,
            scales=tuple(cfg.INFER.SCALES),
            crop_query=cfg.INFER.CROP_QUERY,
            precision=cfg.INFER.PRECISION,
            compiled=cfg.INFER.COMPILE,
            resize="bilinear",
            max_level_pixels=cfg.INFER.MAX_LEVEL_PIXELS,
            batch_size=batch_size,
            chunk_size=cfg.INFER.CHUNK_SIZE if batch_size > 1 else None,
            device="GPU" if gpu else "CPU",
            threads=None if gpu else cfg.INFER.THREADS,
            decoder="nvJPEG" if cfg.INFER.GPU_JPEG else None,
            code_version=code_version(),
            torch=str(torch.__version__),
        )


def load(cfg: CfgNode, device: torch.device | str) -> Network:
    """The network of a configuration, with TEST.WEIGHTS or the newest checkpoint of OUT_DIR.

    Raises `UserError` where there is neither, and `WeightsError` for a file that does not fit.
    """
    plain = build_descriptor(cfg)
    path, notes = load_tested_weights(cfg, plain)
    plain.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stub lacks it
    return Network(cfg, plain, torch.device(device), path, tuple(notes))


def load_file(weights: str | os.PathLike, device: torch.device | str, settings: Sequence[str] = ()) -> Network:
    """The network that a file, or what lies at an http(s) address, tells of; settings (KEY VALUE ...) win over it.

    Raises `WeightsError` for a file that is none, and `DownloadError`.
    """
    path = local_path(os.path.expanduser(weights), Path(get_cfg().DOWNLOAD_CACHE).expanduser())
    cfg = load_cfg(None, [*settings_of(path), "TEST.WEIGHTS", str(path), "NUM_GPUS", "0", *settings])
    return load(cfg, device)


def settings_of(path: str | os.PathLike) -> list[str]:
    """KEY VALUE ... that build the network of a weight file. Raises `WeightsError`."""
    content = read_checkpoint(path)
    settings: dict[str, object] = {"RESNET.STRIDE_1X1": False}  # as in every published file
    settings |= network_settings(read_saved(content.get("cfg"))[0], source=str(path))
    settings |= architecture(normalise_names(content, source=str(path)))
    return [str(part) for setting in settings.items() for part in setting]


def batch_size_of(cfg: CfgNode, *, gpu: bool) -> int:
    """Pictures of one size that are described together, INFER.BATCH_SIZE."""
    return cfg.INFER.BATCH_SIZE or (GPU_BATCH_SIZE if gpu else 1)


def device_of(cfg: CfgNode) -> torch.device:
    """Where this process describes: the CPU, or its GPU."""
    if cfg.NUM_GPUS > 0 and torch.cuda.is_available():
        here = place()
        return torch.device("cuda", device_index(here.local_rank if here else 0, torch.cuda.device_count()))
    return torch.device("cpu")


_exact_lock, _exact_calls = threading.Lock(), contextlib.ExitStack()
_exact_count = 0


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """cuDNN does not round the inputs of float32 convolutions to 10 bits; afterwards all is as the program had it.

    For the time of a call, in a process that is not ours; of several calls at once the first sets it, the last puts it
    back. Threads that run convolutions meanwhile get the same. What is put back are the values in effect: a program
    that lets convolutions inherit `torch.backends.fp32_precision`, and changes that later, sets theirs as well.
    """
    global _exact_count
    with _exact_lock:
        _exact_count += 1
        if _exact_count == 1:
            _exact_calls.enter_context(_tf32_off())
    try:
        yield
    finally:
        with _exact_lock:
            _exact_count -= 1
            if not _exact_count:
                _exact_calls.close()


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    operators = [cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]  # the module replaces itself
    before = [operator.fp32_precision for operator in operators]
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # the program sets the two operators apart, which has no common name
        allowed = None
    cudnn.allow_tf32 = False
    for operator in operators:
        operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


def claim_process(cfg: CfgNode) -> torch.device:
    """Set what all of PyTorch shares as extraction wants it; return `device_of`. For a command's `main` alone."""
    device = device_of(cfg)
    if cfg.NUM_GPUS and device.type == "cpu":
        print(f"note: NUM_GPUS is {cfg.NUM_GPUS}, but no GPU can be used here: the CPU is", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(cfg.INFER.THREADS)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # not the line of source below it
    torch.backends.cudnn.allow_tf32 = False  # or cuDNN rounds the inputs of float32 convolutions to 10 bits
    return device
