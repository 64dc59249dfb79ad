"""Descriptors of whole sets of images, in chunks that survive whatever ends the process.

Every image of a list is accounted for: it has a descriptor, or stands among the rejected with the reason. Chunks are
the same whoever makes them, so any number of shards, stopped at any time and started again, gives the same files.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from core.arguments import load_cfg_from_args
from core.base.errors import UserError, entry_point
from core.base.progress import Counter
from core.base.terminal import work_goes_on
from core.checkpoints.output import check_writable
from core.processes.place import place
from evaler.extraction.gpu_jpeg import nvjpeg
from evaler.extraction.job import Job
from evaler.extraction.join import discard
from evaler.features.exports import export
from evaler.features.provenance import Provenance
from evaler.network import claim_process, device_of, load
from evaler.sources.images import DISTRACTORS, ImageList, distractors, named_images, revisited_set


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Extract what the configuration names; everything is checked before anything is written."""
    work_goes_on()
    cfg = load_cfg_from_args("Extract descriptors of Revisited sets, distractors, or images of one's own.", argv)
    cut, total = which_shard(cfg)
    claim_process(cfg)
    network, provenance = load_network(cfg)
    jobs = [
        Job.make(cfg, network, provenance, Path(cfg.OUT_DIR) / "features" / name, collection, images)
        for name, collections in image_lists(cfg).items()
        for collection, images in collections.items()
    ]
    waiting = [job for job in jobs if not job.is_there()]
    for job in jobs:
        if job not in waiting:
            print(f"{job.title}: {len(job.images)} images are described already, in {job.parent}")
            discard(job.folder)  # what a join left behind that was killed at its end
    for job in waiting:
        check_writable(job.parent)
    left = sum(job.images_left(cut, total) for job in waiting)
    with Counter("extracting", unit="image", total=left) as counter:
        for job in waiting:
            job.extract(cut, total, counter)
    for job in waiting:
        print(job.finish())
    for job in jobs:
        if cfg.INFER.EXPORT and job.is_there():
            export(job.parent, job.plan.collection, cfg.INFER.EXPORT)


def which_shard(cfg: CfgNode) -> tuple[int, int]:
    """This process's shard and their number: under torchrun its rank and world size, else INFER.CUT_NUM, TOTAL_NUM."""
    here = place()
    if here is None or here.world == 1:
        return cfg.INFER.CUT_NUM, cfg.INFER.TOTAL_NUM
    if cfg.INFER.TOTAL_NUM > 1:
        raise UserError(f"INFER.TOTAL_NUM {cfg.INFER.TOTAL_NUM}: under torchrun its processes are the shards; leave 1")
    return here.rank + 1, here.world


def load_network(cfg: CfgNode) -> tuple[nn.Module, Provenance]:
    """The network that describes on `device_of` this process, and the provenance of what it will give.

    Says on stdout which weights these are, and what of them is loaded. Raises as `evaler.network.load`, and `UserError`
    for INFER.GPU_JPEG where it cannot be used.
    """
    device = device_of(cfg)
    gpu = device.type == "cuda"
    if cfg.INFER.GPU_JPEG:
        if not gpu:
            raise UserError("INFER.GPU_JPEG: there is no GPU to decode on here; leave it False")
        nvjpeg()  # or torchvision lacks it
    if cfg.INFER.PRECISION == "fp16" and not gpu:
        print("note: INFER.PRECISION fp16 takes many times longer on a CPU; bf16 is made for it", file=sys.stderr)
    loaded = load(cfg, device)
    print(f"weights: {loaded.weights}, on the {torch.cuda.get_device_name(device) if gpu else 'CPU'}")
    for note in loaded.notes:
        print(note)
    return loaded.arranged(), loaded.provenance


def image_lists(cfg: CfgNode) -> dict[str, dict[str, ImageList]]:
    """Set -> collection -> images: INFER.IMAGES if it is given, else INFER.DATASETS."""
    if cfg.INFER.IMAGES:
        place = Path(cfg.INFER.IMAGES)
        images, notes = named_images(place, cache_dir=Path(cfg.OUT_DIR) / "features")
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return {place.resolve().stem if place.is_file() else place.resolve().name or "root": {"images": images}}
    if not cfg.INFER.DATASETS:
        raise UserError("nothing to extract: name sets in INFER.DATASETS, or images in INFER.IMAGES")
    return {
        name: {"distractors": distractors(cfg.INFER.DATA_DIR, name)}
        if name == DISTRACTORS
        else revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cfg.INFER.CROP_QUERY)
        for name in cfg.INFER.DATASETS
    }
