"""Search of an extracted set by photographs: the command, and what it does as functions."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from core.arguments import Parser, parse
from core.config import load_cfg
from core.environment import entry_point, sha256_file, write_json
from evaler import faiss_index, milvus_index
from evaler.arguments import find_collection
from evaler.extract import load_network
from evaler.extraction_job import limits_of
from evaler.features import Features, FeaturesError, load
from evaler.gpu_jpeg import nvjpeg
from evaler.image_list import ImageList, LooseFiles
from evaler.multiscale import check_lengths, describe_batch
from evaler.pictures import Pictures
from evaler.provenance import LIST_KEYS, MACHINE_KEYS, differing_keys
from evaler.top_k import top_k

# What may differ between a query and what is searched: neither changes what a descriptor means.
MAY_DIFFER = (*LIST_KEYS, *MACHINE_KEYS, "crop_query", "precision", "decoder", "max_level_pixels")


def describe_files(cfg: CfgNode, features: Features, paths: Sequence[Path]) -> np.ndarray:
    """Descriptors float32 [Q, D] of photographs, made as those of `features` were.

    Raises `ImageError` naming a photograph that cannot be used, and `FeaturesError` if the weights or settings are
    others than those the features were made with.
    """
    network, provenance = load_network(cfg)
    differing = differing_keys(provenance, features.provenance, but=MAY_DIFFER)
    if differing:
        told = ", ".join(f"{key} {features.provenance.get(key)} there, {provenance.get(key)} here" for key in differing)
        raise FeaturesError(f"the set was described in another way than the query would be: {told}")
    names, limits = [str(path) for path in paths], limits_of(cfg)
    images = ImageList(names, LooseFiles("", names))
    pictures = Pictures(images, limits, on_gpu=nvjpeg() if cfg.INFER.GPU_JPEG else None)
    sizes = {"scales": limits.scales, "max_pixels": limits.max_level_pixels}
    found = np.concatenate(
        [describe_batch(network, pictures.picture(index).pixels[None], **sizes) for index in range(len(images))]
    )
    check_lengths(found, names)
    return found


def with_weights_of(path: str, settings: list[str], features: Features) -> CfgNode:
    """The configuration, with the weights that the features were made with where it names none."""
    cfg = load_cfg(path, settings)
    told = features.provenance.get("weights")
    if cfg.TEST.WEIGHTS or not told or not Path(told).is_file():
        return cfg
    if sha256_file(told) != features.provenance.get("weights_sha256"):
        print(f"note: {told} is no longer what the set was described with", file=sys.stderr)
        return cfg
    return load_cfg(path, [*settings, "TEST.WEIGHTS", told])


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Find the images of an extracted set that are most like photographs.")
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="images to find for each (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is found here")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>, or <set>/<collection>")
    parser.add_argument("queries", type=Path, nargs="+", metavar="QUERY", help="photographs; behind them KEY VALUE ...")
    args, settings = parse(parser, argv)
    if args.top < 1:
        parser.error(f"--top {args.top}: must be at least 1")
    folder, collection = find_collection(args.index)
    features = load(folder, collection)
    cfg = with_weights_of(args.cfg, settings, features)
    index = faiss_index.read(cfg, folder, collection) if cfg.SEARCH.INDEX else None
    queries = describe_files(cfg, features, args.queries)
    if cfg.SEARCH.URI:
        scores, found = milvus_index.search(cfg.SEARCH.URI, folder, collection, queries, args.top)
    elif index is None:
        scores, found = top_k(queries, features.vectors, args.top)
    else:
        scores, found = faiss_index.search(index, queries, args.top)
    results = []
    for path, of_one, at in zip(args.queries, scores, found, strict=True):
        results.append(
            {
                "query": str(path),
                "found": [
                    {"name": features.names[i], "score": round(float(score), 6)}
                    for score, i in zip(of_one, at.tolist(), strict=True)
                    if i >= 0  # faiss: it looked into too few cells to find so many
                ],
            }
        )
        print(f"\n{path}")
        for number, entry in enumerate(results[-1]["found"], start=1):
            print(f"  {number:>4}  {entry['score']:.4f}  {entry['name']}")
    if args.json:
        write_json(args.json, results)
