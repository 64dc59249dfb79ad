"""Ours against the published way of training: the head, the loader, the whole step."""

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core import builders
from core.config import load_cfg
from core.processes.distributed import training_device
from core.step import TrainStep, set_float32_precision
from datasets.device import DeviceBatches
from datasets.landmark import LandmarkDataset
from datasets.loader import TrainBatches, make_loader
from datasets.transforms import FastTrainTransform, TrainTransform
from model.margin import CosineHead, build_head
from scripts.benchmarks.published_layers import PublishedClassifier, PublishedHead
from scripts.benchmarks.published_transforms import PublishedDataset
from scripts.benchmarks.timing import Case, compare

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "resnet50_delg_8gpu.yaml"
CLASSES, DIM, SCALE, MARGIN = 81_313, 512, 30.0, 0.15
LOADER_FILES, LOADER_SIDE, LOADER_BATCH, LOADER_WORKERS = 48, 1000, 8, 2
LOADER_IMAGES = 4 * LOADER_FILES  # of an epoch: each file is listed so often, or its beginning and end would weigh
Head = TypeVar("Head", CosineHead, PublishedHead)
BYTES_PER_PIXEL = 0.27  # medians of three sets of landmark photographs: 0.24, 0.28, 0.30


def default_device() -> torch.device:
    return training_device(1 if torch.cuda.is_available() else 0)


# -------------------------------------------------------------------------------------------------------------- head


def head_cases(*, batches: tuple[int, ...] = (8, 64), seconds: float = 8.0, least: int = 3) -> Iterator[Case]:
    """Forward and backward of head and loss, CurricularFace as published. Float32 on both sides."""
    device = default_device()
    for batch in batches:
        torch.manual_seed(0)
        ours = build_head("curricularface", DIM, CLASSES, scale=SCALE, margin=MARGIN).to(device).train()
        published = PublishedHead(DIM, CLASSES, scale=SCALE, margin=MARGIN).to(device).train()
        published.load_state_dict(ours.state_dict())
        descriptors = torch.randn(batch, DIM, device=device)
        labels = torch.randint(CLASSES, (batch,), device=device)
        our_loss = functools.partial(_our_loss, labels=labels)
        published_loss = functools.partial(_published_loss, labels=labels)
        sides = [_gradients(ours, descriptors, our_loss), _gradients(published, descriptors, published_loss)]
        exact = PublishedHead(DIM, CLASSES, scale=SCALE, margin=MARGIN).to(device, torch.float64)
        exact.load_state_dict(published.state_dict())
        truth = _gradients(exact, descriptors.double(), published_loss)()
        errors = [max(map(_difference, side(), truth)) for side in sides]
        note = "largest error of a gradient: {:.1e} and {:.1e}".format(*errors)
        yield compare(f"{CLASSES} x {DIM}, batch {batch}", *sides, seconds=seconds, least=least, note=note)


def _our_loss(head: CosineHead, descriptors: Tensor, *, labels: Tensor) -> Tensor:
    return head.loss(descriptors, labels)[0]


def _published_loss(head: nn.Module, descriptors: Tensor, *, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(descriptors, labels), labels)


def _gradients(
    head: Head, descriptors: Tensor, loss: Callable[[Head, Tensor], Tensor]
) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        head.zero_grad(set_to_none=True)
        x = descriptors.clone().requires_grad_()
        loss(head, x).backward()
        assert x.grad is not None and head.weight.grad is not None
        return x.grad, head.weight.grad

    return run


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------------------------------------------------ loader


def loader_cases(mode: str, *, size: int = 512, seconds: float = 20.0, least: int = 3) -> Iterator[Case]:
    """From JPEG files to the normalised float32 batch on the device, an epoch with workers that are running."""
    device = default_device()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"{path.name} 0\n" for path in write_photographs(folder, LOADER_FILES, side=LOADER_SIDE)]
        (folder / "list.txt").write_text("".join(lines) * (LOADER_IMAGES // LOADER_FILES))
        transform = (FastTrainTransform if mode == "fast" else TrainTransform)(size)
        dataset = LandmarkDataset(folder, folder / "list.txt", transform=transform, num_classes=1, seed=1)
        batches = TrainBatches(LOADER_IMAGES, batch_size=LOADER_BATCH, seed=1)
        pin = device.type == "cuda"
        loader = make_loader(dataset, batches, workers=LOADER_WORKERS, pin_memory=pin)
        paths = [dataset.path(index) for index in range(len(dataset))]
        plain = DataLoader(
            PublishedDataset(paths, [0] * len(paths), size=size, seed=1),
            batch_size=LOADER_BATCH,
            shuffle=True,
            num_workers=LOADER_WORKERS,
            pin_memory=pin,
            persistent_workers=True,
            worker_init_fn=_one_thread,
            multiprocessing_context="fork",
        )

        def ours() -> None:
            for batch in DeviceBatches(loader, device):
                assert batch.images.shape == (LOADER_BATCH, 3, size, size) and batch.images.dtype == torch.float32

        def published() -> None:
            for images, _ in plain:
                images = images.to(device, non_blocking=True)
                assert images.shape == (LOADER_BATCH, 3, size, size) and images.dtype == torch.float32

        case = compare(f"JPEG of {LOADER_SIDE} px -> {size} px", ours, published, seconds=seconds, least=least)
        rates = [LOADER_IMAGES / statistics.median(taken) for taken in (case.ours, case.baseline)]
        note = f"{rates[0]:.0f} and {rates[1]:.0f} images/s with {LOADER_WORKERS} workers"
        yield replace(case, note=note)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def write_photographs(folder: Path, count: int, *, side: int, seed: int = 0) -> list[Path]:
    """JPEGs with `side` pixels on their longer side and a photograph's spectrum and bytes per pixel."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        height, width = (side * 3 // 4, side) if number % 3 else (side, side * 3 // 4)
        image = _natural(rng, height, width)
        low, high = 5, 100
        while high - low > 1:  # the quality that gives as many bytes
            middle = (low + high) // 2
            data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, middle])[1]
            low, high = (middle, high) if len(data) < BYTES_PER_PIXEL * height * width else (low, middle)
        path = folder / f"{number:03d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, low])[1].tobytes())
        paths.append(path)
    return paths


def _natural(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: noise whose amplitude falls as 1 / frequency, as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    grey, colour = (
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, s=(height, width)) for _ in "gc"
    )
    planes = [grey + 0.3 * weight * colour for weight in (-1, 0, 1)]
    image = np.stack([128 + 45 * plane / plane.std() for plane in planes], axis=-1)
    return image.clip(0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- step


def step_cases(
    *,
    depth: int = 50,
    size: int = 224,
    batch: int = 8,
    precision: str = "fp32",
    compiled: bool = False,
    seconds: float = 20.0,
    least: int = 3,
) -> Iterator[Case]:
    """One update of DOLG under the published head and optimiser, ours in `precision`, the published loop in float32.

    On a GPU the published loop runs as today's PyTorch runs it, with TF32 in convolutions.
    """
    device = default_device()
    torch.backends.cudnn.benchmark = True
    images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    published = _published_step(depth, images.to(device), labels.to(device), device)
    ours = _our_step(depth, batch, images.to(device), labels.to(device), device, precision, compiled)
    name = f"R{depth}, {size} px, batch {batch}" + (", compiled" if compiled else "")
    case = compare(name, ours, published, seconds=seconds, least=least)
    rates = [batch / statistics.median(side) for side in (case.ours, case.baseline)]
    yield replace(case, note=f"{rates[0]:.1f} and {rates[1]:.1f} images/s")


def _settings(depth: int, batch: int, precision: str, compiled: bool) -> list[str]:
    values = {"NUM_GPUS": int(torch.cuda.is_available()), "TRAIN.BATCH_SIZE": batch, "TRAIN.PRECISION": precision}
    values |= {"MODEL.DEPTH": depth, "TRAIN.COMPILE": compiled, "MODEL.NUM_CLASSES": CLASSES}
    return [str(part) for setting in values.items() for part in setting]


def _our_step(
    depth: int, batch: int, images: Tensor, labels: Tensor, device: torch.device, precision: str, compiled: bool
) -> Callable[[], None]:
    cfg = load_cfg(RECIPE, _settings(depth, batch, precision, compiled))
    torch.manual_seed(0)
    model = builders.build_classifier(cfg).train()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    step: TrainStep = builders.build_step(cfg, model, builders.build_optimizer(cfg, model))
    images = images.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        set_float32_precision(precision)
        step(images, labels)

    return run


def _published_step(depth: int, images: Tensor, labels: Tensor, device: torch.device) -> Callable[[], None]:
    cfg = load_cfg(RECIPE, _settings(depth, len(images), "fp32", False))
    torch.manual_seed(0)
    same = builders.build_classifier(cfg)  # the weights that ours starts from
    descriptor = builders.build_descriptor(cfg)
    descriptor.load_state_dict({k: v for k, v in same.state_dict().items() if not k.startswith("desc_cls.")})
    head = PublishedHead(DIM, CLASSES, scale=SCALE, margin=MARGIN)
    head.load_state_dict(same.desc_cls.state_dict())
    model = PublishedClassifier(descriptor, head).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def run() -> None:
        # As PyTorch is today when nobody sets anything.
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        logits = model(images, labels)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = logits.topk(5, dim=1).indices == labels[:, None]
        errors = [100 * (1 - hits[:, :k].any(dim=1).float().mean()) for k in (1, 5)]
        assert [value.item() for value in (loss, *errors)]  # read at every iteration

    return run


def peak_flops(dtype: torch.dtype, *, size: int = 8192, seconds: float = 2.0) -> float:
    """Operations a second of a square matrix product on the GPU: what is measured, not what is advertised."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    case = compare("matrix product", lambda: a @ b, lambda: a @ b, seconds=seconds)
    return 2 * size**3 / statistics.median((*case.ours, *case.baseline))
