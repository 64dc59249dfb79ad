"""Approximate search: a faiss index beside a collection, named by its factory string (SEARCH.INDEX).

https://github.com/facebookresearch/faiss/wiki/The-index-factory

Two files: `<collection>.faiss`, and `<collection>.faiss.json` with what it was built from. It belongs to one state of
the descriptors, told by their sha256, and is refused with any other.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from core.config import load_cfg
from core.counter import bar
from core.environment import atomic_write, entry_point, sha256_file, write_json
from evaler.arguments import find_collection, split_settings
from evaler.features import Features, FeaturesError, chunks, load, read_manifest, some, write
from evaler.provenance import LIST_KEYS, MACHINE_KEYS, check_alike, differing_keys
from evaler.top_k import top_k

MOST_TRAINED_ON = 1 << 18
PROBED, PROBED_TOP = 200, 10  # images that the recall is measured with, and at which rank


def build(cfg: CfgNode, folder: Path, collection: str) -> float:
    """Write the index of SEARCH.INDEX; return the part of the exact nearest images that it finds (recall at 10).

    Raises `ValueError` for a string that faiss refuses.
    """
    faiss = search_library()
    vectors = load(folder, collection).vectors
    if not len(vectors):
        raise FeaturesError(f"{folder}: '{collection}' holds no image to index")
    sample = np.sort(np.random.default_rng(0).permutation(len(vectors))[:MOST_TRAINED_ON])
    try:
        index = faiss.index_factory(vectors.shape[1], cfg.SEARCH.INDEX, faiss.METRIC_INNER_PRODUCT)
        work = faiss.index_cpu_to_all_gpus(index) if _gpus(cfg) else index
        if not work.is_trained:
            work.train(np.asarray(vectors[sample], dtype=np.float32))
        with bar(None, "indexing", unit="image", total=len(vectors), delay=1, leave=False) as shown:
            for _, rows in chunks(vectors):
                work.add(np.asarray(rows, dtype=np.float32))
                shown.update(len(rows))
        index = faiss.index_gpu_to_cpu(work) if _gpus(cfg) else index
    except RuntimeError as error:
        raise ValueError(f"SEARCH.INDEX {cfg.SEARCH.INDEX}: faiss refuses it: {_last_line(error)}") from None
    _set_parameters(index, cfg.SEARCH.PARAMETERS)
    recall = measure_recall(index, vectors)
    path, told = _paths(folder, collection)
    told.unlink(missing_ok=True)  # from here to the end there is none
    with atomic_write(path) as file:
        file.write(faiss.serialize_index(index))
    description = {
        "factory": cfg.SEARCH.INDEX,
        "npy_sha256": read_manifest(folder, collection)["sha256"]["npy"],
        "sha256": sha256_file(path),
        "faiss": faiss.__version__,
        "parameters": cfg.SEARCH.PARAMETERS,
        f"recall@{PROBED_TOP}": recall,
    }
    write_json(told, description, sort_keys=True)
    return recall


def read(cfg: CfgNode, folder: Path, collection: str):
    """The index of SEARCH.INDEX. Raises `FeaturesError` if it is absent, another one, or of other descriptors."""
    faiss = search_library()
    path, told = _paths(folder, collection)
    mend = "build it with evaler/index.py"
    try:
        description = json.loads(told.read_bytes())
        found = description["factory"], description["npy_sha256"], description["sha256"]
    except FileNotFoundError:
        raise FeaturesError(f"{path}: no index; {mend}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise FeaturesError(f"{told}: not the description of an index; {mend}") from None
    if found[0] != cfg.SEARCH.INDEX:
        raise FeaturesError(f"{path}: is {found[0]}, SEARCH.INDEX {cfg.SEARCH.INDEX}; {mend}")
    if found[1] != read_manifest(folder, collection)["sha256"]["npy"]:
        raise FeaturesError(f"{path}: of other descriptors than those beside it; {mend}")
    if not path.is_file() or sha256_file(path) != found[2]:
        raise FeaturesError(f"{path}: missing or damaged (sha256); {mend}")
    index = faiss.read_index(str(path))
    _set_parameters(index, cfg.SEARCH.PARAMETERS)
    return faiss.index_cpu_to_all_gpus(index) if _gpus(cfg) else index


def search(index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `top_k`, by an index; -1 stands where it finds fewer than k."""
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, index.ntotal))


def measure_recall(index, vectors: np.ndarray) -> float:
    """The part of the exact first ten images, each of some images' own left out, that are among its first ten."""
    rows = np.sort(np.random.default_rng(1).permutation(len(vectors))[:PROBED])
    queries = np.asarray(vectors[rows], dtype=np.float32)
    _, exact = top_k(queries, vectors, PROBED_TOP, exclude=rows)
    _, found = search(index, queries, PROBED_TOP + 1)
    if not exact.size:
        return 1.0
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(exact, found, strict=True))
    return hits / exact.size


def add(folder: Path, collection: str, other: Path) -> int:
    """Put the images of another collection behind those of this one, and remove its index; return their number.

    Names and descriptors stay together; a process that is killed leaves the old collection, or none that counts as
    whole. Raises `FeaturesError` for names that both have, and for descriptors made in another way.
    """
    one, two = load(folder, collection), load(*find_collection(other))
    check_alike(str(folder), one, str(other), two, but=(*LIST_KEYS, *MACHINE_KEYS))
    differing = differing_keys(one.provenance, two.provenance, but=LIST_KEYS)
    if differing:
        print(
            f"note: {other} differs in {', '.join(differing)}, which the set does not tell from now on", file=sys.stderr
        )
    double = sorted(set(one.names) & set(two.names))
    if double:
        raise FeaturesError(f"{other}: {some(double)} is in {folder} already; nothing is added")
    for path in _paths(folder, collection):
        path.unlink(missing_ok=True)
    lists = [f.provenance.get("list_sha256") for f in (one, two)]
    provenance = one.provenance | {"list_sha256": "+".join(map(str, lists))}
    behind = len(one.names) + len(one.rejected)  # where the second list begins
    rejected = [entry._replace(index=entry.index + behind) for entry in two.rejected]
    parts = [
        Features(f.names, f.vectors, f.sizes, provenance, reasons, f.machines)
        for f, reasons in ((one, one.rejected), (two, rejected))
    ]
    count = len(one.names) + len(two.names)
    if (one.dtype, two.dtype) == ("float16", "float32"):
        print("note: float32 descriptors are added to float16 ones and rounded", file=sys.stderr)
    write(folder, collection, parts, count=count, dim=one.vectors.shape[1], dtype=one.dtype)
    return len(two.names)


def search_library():
    """Raises `ValueError` where faiss is not installed."""
    try:
        import faiss  # not at the top: few commands need it, and it brings threads of its own
    except ImportError as error:
        raise ValueError(f"SEARCH.INDEX needs faiss ({error}); install faiss-gpu or faiss-cpu") from None
    return faiss


def _paths(folder: Path, collection: str) -> tuple[Path, Path]:
    return folder / f"{collection}.faiss", folder / f"{collection}.faiss.json"


def _gpus(cfg: CfgNode) -> int:
    faiss = search_library()
    return faiss.get_num_gpus() if cfg.NUM_GPUS and hasattr(faiss, "StandardGpuResources") else 0


def _set_parameters(index, parameters: str) -> None:
    if parameters:
        try:
            search_library().ParameterSpace().set_index_parameters(index, parameters)
        except RuntimeError as error:
            raise ValueError(f"SEARCH.PARAMETERS {parameters}: faiss refuses it: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    """Of faiss's message, which begins with the place in its code."""
    return " ".join(str(error).split())[-200:]


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the faiss index SEARCH.INDEX of an extracted set.")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--add", type=Path, metavar="OTHER", help="first add the images of this extracted set")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>; behind it KEY VALUE ...")
    arguments, settings = split_settings(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    cfg = load_cfg(args.cfg, settings)
    if not cfg.SEARCH.INDEX and args.add is None:
        raise ValueError("SEARCH.INDEX is empty, which is exact search and needs no index; name a factory string")
    folder, collection = find_collection(args.index)
    if args.add is not None:
        count = add(folder, collection, args.add)
        print(f"{folder}: {count} images added, {read_manifest(folder, collection)['count']} in all")
    if cfg.SEARCH.INDEX:
        recall = build(cfg, folder, collection)
        path, _ = _paths(folder, collection)
        print(f"{path}: {cfg.SEARCH.INDEX}, {100 * recall:.1f} % of the exact first {PROBED_TOP} are found")
