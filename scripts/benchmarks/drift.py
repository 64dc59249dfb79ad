"""What precision, batching, resizing and scales do to the descriptors of a set, to its scores, and to the speed."""

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from core.base.json_files import write_json
from core.base.progress import Counter
from datasets.transforms import normalise, scaled_size
from evaler.extraction.command import image_lists
from evaler.extraction.gpu_jpeg import nvjpeg
from evaler.extraction.job import limits_of
from evaler.extraction.multiscale import describe, describe_batch
from evaler.extraction.pictures import Pictures
from evaler.network import Network, device_of, load
from evaler.sources.images import ImageList
from revisitop import groundtruth, protocol
from scripts.benchmarks.timing import machine, versions


@dataclass(frozen=True)
class Variant:
    """A way to describe: `network` (plain, or a precision of `for_inference`), batch size, scales, resizing."""

    name: str
    network: str = "fp32"
    batch_size: int = 1
    scales: tuple[float, ...] = ()  # empty: INFER.SCALES
    resize: Callable[[np.ndarray, int, int], np.ndarray] | None = None  # uint8 image, width, height; None: bilinear
    stored: str = "float32"
    gpu_jpeg: bool = False


@dataclass(frozen=True)
class Row:
    """What a variant gives. Distances are 1 - cosine to the first variant's; mAP in percent, empty without truth."""

    variant: str
    largest: float
    mean: float
    scores: tuple[float, ...]
    images_per_second: float


def _on_uint8(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _antialiased(image: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = width < image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def variants(*, compiled: bool, gpu: bool) -> list[Variant]:
    """The plain network first: that is what the others are compared with."""
    variants_made = [
        Variant("plain network", network="plain"),
        Variant("fp32"),
        Variant("fp32, batches of 8", batch_size=8),
        Variant("bf16", network="bf16"),
        Variant("fp32, float16 on disk", stored="float16"),
        Variant("resized as uint8", resize=_on_uint8),
        Variant("resized with antialiasing", resize=_antialiased),
        Variant("single scale", scales=(1.0,)),
    ]
    if gpu:  # on a CPU it takes minutes an image
        variants_made.insert(4, Variant("fp16", network="fp16"))
        if importlib.util.find_spec("torchvision") is not None:
            variants_made.append(Variant("JPEGs decoded on the GPU", gpu_jpeg=True))
    if compiled:
        variants_made.append(Variant("fp32, compiled", network="compiled"))
    return variants_made


def drift(cfg: CfgNode, *, most: int | None = None, compiled: bool = False) -> list[Row]:
    """Describe the first set of the configuration in every way; only `most` images of each collection, if given.

    A set with all of its images has mAP (easy, medium, hard). Describing is timed, decoding is not. The process is
    expected to be one that `evaler.network.claim_process` has set up.
    """
    device = device_of(cfg)
    loaded = load(cfg, device)
    name, collections = next(iter(image_lists(cfg).items()))
    truth = None
    if most is None and "database" in collections:
        truth = groundtruth.load(groundtruth.path_of(cfg.INFER.DATA_DIR, name))
    wanted = variants(compiled=compiled, gpu=device.type == "cuda")
    networks = {way: _network(loaded, way) for way in {variant.network for variant in wanted}}
    count = sum(min(len(images), most or len(images)) for images in collections.values())
    rows, first = [], None
    with Counter("describing", unit="image", total=count * len(wanted)) as counter:
        for variant in wanted:
            described = {
                collection: _described(cfg, networks[variant.network], variant, images, most, counter)
                for collection, images in collections.items()
            }
            vectors = {collection: found[0] for collection, found in described.items()}
            first = first or vectors
            distances = np.concatenate([_distances(vectors[key], first[key]) for key in vectors])
            scores: tuple[float, ...] = ()
            if truth is not None:
                found = protocol.evaluate(vectors["queries"], vectors["database"], truth, (1,))
                scores = tuple(100 * float(found[setting]["mAP"]) for setting in protocol.SETTINGS)
            seconds = sum(found[1] for found in described.values())
            rows.append(Row(variant.name, distances.max().item(), distances.mean().item(), scores, count / seconds))
    return rows


def _network(loaded: Network, way: str) -> nn.Module:
    if way == "plain":
        return loaded.plain
    return loaded.arranged(precision="fp32" if way == "compiled" else way, compiled=way == "compiled")


def _described(
    cfg: CfgNode, network: nn.Module, variant: Variant, images: ImageList, most: int | None, counter: Counter
) -> tuple[np.ndarray, float]:
    """Descriptors float32 [N, D], and the seconds that they took."""
    scales, seconds = variant.scales or tuple(cfg.INFER.SCALES), 0.0
    vectors: dict[int, np.ndarray] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}

    def run(group: list[tuple[int, np.ndarray]]) -> float:
        start = time.perf_counter()
        pixels = np.stack([image for _, image in group])
        vectors_made = _describe(network, variant, pixels, scales).astype(variant.stored).astype(np.float32)
        vectors.update(zip((index for index, _ in group), vectors_made, strict=True))
        counter.add(len(group))
        return time.perf_counter() - start

    pictures = Pictures(images, limits_of(cfg), on_gpu=nvjpeg() if variant.gpu_jpeg else None)
    for index in range(min(len(images), most or len(images))):
        image = torch.as_tensor(pictures.picture(index).pixels).cpu().numpy()
        group = waiting.setdefault(image.shape, [])
        group.append((index, image))
        if len(group) == variant.batch_size:
            seconds += run(waiting.pop(image.shape))
    seconds += sum(run(group) for group in waiting.values())
    return np.stack([vectors[index] for index in sorted(vectors)]), seconds


def _describe(network: nn.Module, variant: Variant, pixels: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    if variant.network == "plain":
        return np.stack([describe(network, image, scales=scales).cpu().numpy() for image in pixels])
    if variant.resize is None:
        return describe_batch(network, pixels, scales=scales)
    (image,) = pixels
    device = next(network.parameters()).device
    levels = [_level(image, variant.resize, scale).to(device) for scale in scales]
    sum_ = sum((F.normalize(network(level)) for level in levels), torch.zeros(()))
    return F.normalize(sum_).cpu().numpy()


def _level(image: np.ndarray, resize: Callable[..., np.ndarray], scale: float) -> Tensor:
    size = scaled_size(image.shape[1], image.shape[0], scale)
    return torch.from_numpy(normalise(resize(image, *size).astype(np.float32)))[None]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine of unit vectors, a row each: as half the squared distance, which does not cancel."""
    a, b = (rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (a, b))
    return np.square(a - b).sum(axis=1) / 2


def table(rows: Iterable[Row]) -> str:
    """For a terminal."""
    lines = [f"{'':<28}{'1 - cosine: largest':>20}{'mean':>10}{'mAP E':>9}{'M':>8}{'H':>8}{'images/s':>11}"]
    for row in rows:
        scores = "".join(f"{score:>8.2f}" for score in row.scores) or f"{'-':>8}" * 3
        numbers = f"{row.largest:>20.1e}{row.mean:>10.1e} {scores}{row.images_per_second:>11.2f}"
        lines.append(f"  {row.variant:<26}{numbers}")
    return "\n".join(lines)


def write(rows: Iterable[Row], path: Path) -> None:
    """The same as JSON, with machine and versions."""
    record = {"name": "drift", "rows": [asdict(row) for row in rows], "machine": machine(), "versions": versions()}
    write_json(path, record)
