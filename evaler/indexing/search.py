"""Search of an extracted set by photographs: the command, and what it does as functions."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from core.arguments import parse
from core.base.arguments import Parser
from core.base.errors import USER_ERROR_EXIT_CODE, UserError, entry_point
from core.base.files import sha256_file
from core.base.json_files import write_json
from core.base.terminal import one_line
from core.config import load_cfg
from datasets.images.decode import ImageError
from evaler.extraction.command import load_network
from evaler.extraction.gpu_jpeg import nvjpeg
from evaler.extraction.job import limits_of
from evaler.extraction.multiscale import check_lengths, describe_batch
from evaler.extraction.pictures import Pictures
from evaler.features.places import find_collection
from evaler.features.provenance import Purpose
from evaler.features.store import Features, FeaturesError, load
from evaler.features.top_k import top_k
from evaler.indexing import faiss_index, milvus_index
from evaler.network import claim_process
from evaler.sources.image_list import ImageList, LooseFiles
from evaler.sources.image_names import search


def describe_files(cfg: CfgNode, features: Features, paths: Sequence[Path]) -> tuple[np.ndarray, dict[Path, str]]:
    """Descriptors float32 [Q, D] of photographs, made as those of `features` were; and those that cannot be used, which
    have no row, with the reason.

    Raises `FeaturesError` if the weights or settings are others than those the features were made with.
    """
    network, provenance = load_network(cfg)
    differing = features.provenance.differing(provenance, Purpose.SEARCHABLE)
    if differing:
        difference = ", ".join(f"{key} {there} there, {here} here" for key, (there, here) in differing.items())
        raise FeaturesError(
            f"the set was described in another way than the query would be: {difference}; give the settings (INFER, "
            "MODEL) that the set was extracted with"
        )
    names, limits = [str(path) for path in paths], limits_of(cfg)
    images = ImageList(names, LooseFiles("", names))
    pictures = Pictures(images, limits, on_gpu=nvjpeg() if cfg.INFER.GPU_JPEG else None)
    found, broken = [np.empty((0, features.vectors.shape[1]), np.float32)], {}
    for index, path in enumerate(paths):
        try:
            pixels = pictures.picture(index).pixels[None]
        except ImageError as error:
            broken[path] = str(error)
            continue
        found.append(describe_batch(network, pixels, scales=limits.scales, max_pixels=limits.max_level_pixels))
    vectors = np.concatenate(found)
    check_lengths(vectors, [str(path) for path in paths if path not in broken])
    return vectors, broken


def photographs(places: Sequence[Path]) -> list[Path]:
    """The files named, and of a folder the images in it and below. Raises `UserError` for a folder without any."""
    paths = []
    for place in places:
        if not place.is_dir():
            paths.append(place)
            continue
        images = search(place).images
        if not images:
            raise UserError(f"{place}: no photographs in this folder to search by")
        paths += [place / name for name in images]
    return paths


def with_weights_of(path: str, settings: list[str], features: Features) -> CfgNode:
    """The configuration, with the weights that the features were made with where it names none."""
    cfg = load_cfg(path, settings)
    recorded = features.provenance.weights
    if cfg.TEST.WEIGHTS or recorded is None or not os.path.isfile(recorded):  # isfile: for any text
        return cfg
    if sha256_file(recorded) != features.provenance.weights_sha256:
        print(f"note: {recorded} is no longer what the set was described with", file=sys.stderr)
        return cfg
    return load_cfg(path, [*settings, "TEST.WEIGHTS", recorded])


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Find the images of an extracted set that are most like photographs.")
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="images to find for each (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is found here")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>, or <set>/<collection>")
    parser.add_argument(
        "queries", type=Path, nargs="+", metavar="QUERY", help="photographs, or folders of them; then KEY VALUE ..."
    )
    args, settings = parse(parser, argv)
    if args.top < 1:
        parser.error(f"--top {args.top}: must be at least 1")
    folder, collection = find_collection(args.index)
    features = load(folder, collection)
    cfg = with_weights_of(args.cfg, settings, features)
    index = faiss_index.read(cfg, folder, collection) if cfg.SEARCH.INDEX else None
    asked = photographs(args.queries)
    claim_process(cfg)
    queries, broken = describe_files(cfg, features, asked)
    for reason in broken.values():
        print(f"error: {one_line(reason)}", file=sys.stderr)
    asked = [path for path in asked if path not in broken]
    if not len(queries):
        scores, neighbours = np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
    elif cfg.SEARCH.URI:
        scores, neighbours = milvus_index.search(cfg.SEARCH.URI, folder, collection, queries, args.top)
    elif index is None:
        scores, neighbours = top_k(queries, features.vectors, args.top)
    else:
        scores, neighbours = faiss_index.search(index, queries, args.top)
    results: list[dict[str, Any]] = []
    for path, of_one, at in zip(asked, scores, neighbours, strict=True):
        hits = [
            {"name": features.names[i], "score": round(float(score), 6)}
            for score, i in zip(of_one, at.tolist(), strict=True)
            if i >= 0  # faiss: it looked into too few cells to find so many
        ]
        results.append({"query": str(path), "found": hits})
    if args.json:  # before anything is printed, which may fail
        write_json(args.json, results)
    for result in results:
        print(f"\n{result['query']}")
        for number, entry in enumerate(result["found"], start=1):
            print(f"  {number:>4}  {entry['score']:.4f}  {entry['name']}")
    if broken:
        sys.stdout.flush()
        sys.exit(USER_ERROR_EXIT_CODE)
