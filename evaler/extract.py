"""Descriptors of whole sets of images, written where evaluate.py finds them."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from core.builders import build_descriptor, load_tested_weights
from core.config import load_cfg_from_args
from core.environment import code_version, entry_point, is_user_error, sha256_file
from core.progress import progress
from evaler.features import Features, FeaturesError, load_shard, save
from evaler.images import ImageList, image_folder, read_cropped, revisited_set
from evaler.multiscale import describe


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Extract what the configuration names; everything is checked before anything is written."""
    cfg = load_cfg_from_args("Extract descriptors of Revisited sets, or of a folder of images.", argv)
    network, provenance = load_network(cfg)
    sets = image_lists(cfg)
    hashes = {name: {key: images.sha256() for key, images in collections.items()} for name, collections in sets.items()}
    for name, collections in sets.items():
        folder = Path(cfg.OUT_DIR) / "features" / name
        extract_set(cfg, network, provenance, collections, hashes[name], folder)
        print(f"{name}: descriptors are in {folder}")


def load_network(cfg: CfgNode) -> tuple[nn.Module, dict]:
    """The descriptor network on this process's device, ready to describe, and the provenance of what it will give."""
    gpu = cfg.NUM_GPUS > 0 and torch.cuda.is_available()
    if cfg.NUM_GPUS and not gpu:
        print(f"note: NUM_GPUS is {cfg.NUM_GPUS}, but no GPU can be used here: the CPU is", file=sys.stderr)
    torch.backends.cudnn.allow_tf32 = False  # or cuDNN rounds the inputs of float32 convolutions to 10 bits
    network = build_descriptor(cfg)
    path, notes = load_tested_weights(cfg, network)
    print(f"weights: {path}, on the {torch.cuda.get_device_name() if gpu else 'CPU'}")
    for note in notes:
        print(note)
    provenance = {
        "weights": str(path),
        "weights_sha256": sha256_file(path),
        "depth": cfg.MODEL.DEPTH,
        "with_ma": cfg.MODEL.WITH_MA,
        "fusion": cfg.MODEL.FUSION,
        "stride_1x1": cfg.RESNET.STRIDE_1X1,
        "bn_eps": cfg.BN.EPS,
        "scales": list(cfg.INFER.SCALES),
        "crop_query": cfg.INFER.CROP_QUERY,
        "precision": "float32",
        "code_version": code_version(),
        "torch": torch.__version__,
    }
    return network.to("cuda" if gpu else "cpu", memory_format=torch.channels_last).eval(), provenance


def image_lists(cfg: CfgNode) -> dict[str, dict[str, ImageList]]:
    """Set -> collection -> images: INFER.IMAGES if it is given, else INFER.DATASETS."""
    if cfg.INFER.IMAGES:
        images, others = image_folder(cfg.INFER.IMAGES)
        if others:
            note = f"note: {others} files in {cfg.INFER.IMAGES} have no image's extension and are left out"
            print(note, file=sys.stderr)
        return {Path(cfg.INFER.IMAGES).resolve().name: {"images": images}}
    if not cfg.INFER.DATASETS:
        raise ValueError("nothing to extract: name sets in INFER.DATASETS, or a folder in INFER.IMAGES")
    return {
        name: revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY) for name in cfg.INFER.DATASETS
    }


def extract_set(
    cfg: CfgNode,
    network: nn.Module,
    provenance: dict,
    collections: dict[str, ImageList],
    hashes: dict[str, str],
    folder: Path,
) -> None:
    """Describe this process's shard of every collection, unless the same descriptors are there already.

    The set is written when all of it is described, so that one with a broken image leaves nothing behind.
    """
    cut, total = cfg.INFER.CUT_NUM, cfg.INFER.TOTAL_NUM
    described = {}
    for collection, images in collections.items():
        part = images.shard(cut, total)
        expected = {**provenance, "list_sha256": hashes[collection]}
        if is_there(folder, collection, expected, cut=cut, total=total):
            print(f"{folder.name}: {len(part)} descriptors of {collection} are there already")
            continue
        title = f"{folder.name} {collection}" + (f" {cut}/{total}" if total > 1 else "")
        described[collection] = extract(network, part, expected, scales=cfg.INFER.SCALES, title=title)
    for collection, features in described.items():
        save(folder, collection, features, cut=cut, total=total)


def is_there(folder: Path, collection: str, provenance: dict, *, cut: int, total: int) -> bool:
    """Whether a complete shard of this provenance lies in `folder`."""
    try:
        return load_shard(folder, collection, cut=cut, total=total).provenance == provenance
    except FeaturesError:
        return False  # absent or broken: it is written anew


def extract(network: nn.Module, images: ImageList, provenance: dict, *, scales: list[float], title: str) -> Features:
    """Describe every image. Raises `ImageError` naming the first one that cannot be read."""
    vectors, sizes = [], []
    rows = zip(images.paths, images.boxes, strict=True)
    with progress(rows, title, unit="image", total=len(images)) as bar:
        for path, box in bar:
            image = read_cropped(path, box)
            try:
                vectors.append(describe(network, image, scales=scales).float().cpu().numpy())
            except ValueError as error:
                if not is_user_error(error):
                    raise
                raise ValueError(f"{path}: {error}") from None
            sizes.append(image.shape[1::-1])
    dim = network.fc.out_features
    return Features(
        images.names,
        np.array(vectors, np.float32).reshape(-1, dim),
        np.array(sizes, np.int32).reshape(-1, 2),
        provenance,
    )
