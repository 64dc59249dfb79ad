"""Ours against the published way of describing a photograph: five scales, from decoded pixels to the descriptor."""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from core.builders import build_descriptor
from core.config import get_cfg, load_cfg
from core.step import set_float32_precision
from datasets.images.decode import decode
from datasets.transforms import normalise, resize_bilinear
from evaler.extraction.multiscale import describe_batch
from model.dolg import DOLG
from model.inference import for_inference
from scripts.benchmarks.timing import Case, compare
from scripts.benchmarks.training import default_device, write_photographs

# How far a descriptor may be from the published way's, 1 - cosine.
TOLERANCE = {"fp32": 1e-6, "fp16": 1e-4, "bf16": 2e-3}


def extract_cases(
    mode: str, *, depth: int = 50, size: tuple[int, int] = (768, 1024), seconds: float = 30.0, least: int = 3
) -> Iterator[Case]:
    """One photograph of height and width `size` at a time, both sides on the same threads or GPU.

    `mode` is the precision of ours, fp32, bf16 or fp16; the published way is float32. Raises `AssertionError` if the
    two descriptors differ by more than `TOLERANCE`.
    """
    device, scales = default_device(), tuple(get_cfg().INFER.SCALES)
    set_float32_precision("fp32")
    photograph = _photograph(*size)
    network = _network(depth, photograph).to(device)
    arranged = for_inference(network, precision=mode)
    descriptors: dict[str, np.ndarray] = {}

    def ours() -> None:
        descriptors["ours"] = describe_batch(arranged, photograph[None], scales=scales)[0]

    def published() -> None:
        descriptors["published"] = describe_as_published(network, photograph, scales, device)

    name = f"R{depth} with multi-atrous, {size[1]} x {size[0]}, {len(scales)} scales"
    case = compare(name, ours, published, seconds=seconds, least=least)
    difference = distance(descriptors["ours"], descriptors["published"])
    assert difference <= TOLERANCE[mode], f"1 - cosine of {difference:.1e} to the published way, in {mode}"
    rates = [1 / statistics.median(side) for side in (case.ours, case.baseline)]
    note = f"{rates[0]:.2f} and {rates[1]:.2f} images/s, 1 - cosine between both: {difference:.1e}"
    yield replace(case, note=note)


@torch.no_grad()
def describe_as_published(
    network: DOLG, image: np.ndarray, scales: tuple[float, ...], device: torch.device
) -> np.ndarray:
    """The release's arithmetic, step by step: uint8 [H, W, 3] BGR -> descriptor [D]."""
    height, width = image.shape[:2]
    descriptors = []
    for scale in scales:
        level = resize_bilinear(image.astype(np.float32), round(width * scale), round(height * scale))
        batch = torch.from_numpy(normalise(level))[None].to(device)
        descriptors.append(F.normalize(network(batch))[0].cpu().numpy())
    mean = np.mean(descriptors, axis=0)
    return mean / np.linalg.norm(mean)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine, of two vectors [D], computed in float64: as half the squared distance of the unit vectors."""
    a, b = (vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64)) for vector in (a, b))
    return float(np.square(a - b).sum() / 2)


def _photograph(height: int, width: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = write_photographs(Path(folder), 1, side=max(height, width))[0]
        return cv2.resize(decode(path), (width, height), interpolation=cv2.INTER_AREA)


def _network(depth: int, photograph: np.ndarray) -> DOLG:
    """With random weights, and BN statistics of a photograph, so that no map vanishes or explodes."""
    torch.manual_seed(0)
    settings = {"MODEL.DEPTH": depth, "MODEL.WITH_MA": True, "BN.MOM": 1.0, "RESNET.STRIDE_1X1": False, "NUM_GPUS": 0}
    network = build_descriptor(load_cfg(None, [str(part) for setting in settings.items() for part in setting]))
    small = cv2.resize(photograph, (256, 192), interpolation=cv2.INTER_AREA).astype(np.float32)
    with torch.no_grad():
        network.train()(torch.from_numpy(normalise(small))[None])
    return network.eval()
