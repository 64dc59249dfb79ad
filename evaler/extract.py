"""Descriptors of whole sets of images, written where evaluate.py finds them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from core.builders import build_descriptor, load_tested_weights
from core.config import load_cfg_from_args
from core.environment import code_version, entry_point, sha256_file
from core.progress import progress
from evaler.features import Features, FeaturesError, load_shard, save
from evaler.images import ImageList, image_folder, read_cropped, revisited_set
from evaler.multiscale import describe


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Extract what the configuration names; everything is checked before anything is written."""
    cfg = load_cfg_from_args("Extract descriptors of Revisited sets, or of a folder of images.", argv)
    network, provenance = load_network(cfg)
    for name, collections in image_lists(cfg).items():
        folder = Path(cfg.OUT_DIR) / "features" / name
        for collection, images in collections.items():
            extract_collection(cfg, network, provenance, images, folder, collection)
        print(f"{name}: descriptors are in {folder}")


def load_network(cfg: CfgNode) -> tuple[nn.Module, dict]:
    """The descriptor network on this process's device, ready to describe, and the provenance of what it will give."""
    gpu = cfg.NUM_GPUS > 0 and torch.cuda.is_available()
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
        "scales": list(cfg.INFER.SCALES),
        "crop_query": cfg.INFER.CROP_QUERY,
        "precision": "float32",
        "code_version": code_version(),
        "torch": torch.__version__,
    }
    return network.to("cuda" if gpu else "cpu").eval(), provenance


def image_lists(cfg: CfgNode) -> dict[str, dict[str, ImageList]]:
    """Set -> collection -> images: INFER.IMAGES if it is given, else INFER.DATASETS."""
    if cfg.INFER.IMAGES:
        images, others = image_folder(cfg.INFER.IMAGES)
        if others:
            print(f"note: {others} files in {cfg.INFER.IMAGES} have no image's extension and are left out")
        return {Path(cfg.INFER.IMAGES).resolve().name: {"images": images}}
    if not cfg.INFER.DATASETS:
        raise ValueError("nothing to extract: name sets in INFER.DATASETS, or a folder in INFER.IMAGES")
    return {
        name: revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY) for name in cfg.INFER.DATASETS
    }


def extract_collection(
    cfg: CfgNode, network: nn.Module, provenance: dict, images: ImageList, folder: Path, collection: str
) -> None:
    """Describe this process's shard of `images` and save it, unless the same descriptors are there already."""
    provenance = {**provenance, "list_sha256": images.sha256()}
    cut, total = cfg.INFER.CUT_NUM, cfg.INFER.TOTAL_NUM
    part = images.shard(cut, total)
    try:
        if load_shard(folder, collection, cut=cut, total=total).provenance == provenance:
            print(f"{collection}: {len(part)} descriptors are there already")
            return
    except FeaturesError:
        pass  # absent or broken: it is written now
    title = f"{folder.name} {collection}" + (f" {cut}/{total}" if total > 1 else "")
    features = extract(network, part, provenance, scales=cfg.INFER.SCALES, title=title)
    save(folder, collection, features, cut=cut, total=total)


def extract(
    network: nn.Module, images: ImageList, provenance: dict, *, scales: list[float], title: str
) -> Features:
    """Describe every image. Raises `ImageError` naming the first one that cannot be read."""
    vectors, sizes = [], []
    for path, box in progress(zip(images.paths, images.boxes, strict=True), title, unit="image", total=len(images)):
        image = read_cropped(path, box)
        try:
            vectors.append(describe(network, image, scales=scales).float().cpu().numpy())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        sizes.append(image.shape[1::-1])
    dim = network.fc.out_features
    return Features(
        images.names,
        np.array(vectors, np.float32).reshape(-1, dim),
        np.array(sizes, np.int32).reshape(-1, 2),
        provenance,
    )
