"""Approximate search: a faiss index beside a collection, named by its factory string (SEARCH.INDEX).

https://github.com/facebookresearch/faiss/wiki/The-index-factory

Two files: `<collection>.faiss`, and `<collection>.faiss.json` with what it was built from. It belongs to one state of
the descriptors, told by their sha256, and is refused with any other.
"""

import json
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from core.counter import bar
from core.environment import atomic_write, sha256_file, write_json
from evaler.features import FeaturesError, chunks, load, read_manifest
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
    path, told = paths(folder, collection)
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
    path, told = paths(folder, collection)
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


def search_library():
    """Raises `ValueError` where faiss is not installed."""
    try:
        import faiss  # not at the top: few commands need it, and it brings threads of its own
    except ImportError as error:
        raise ValueError(f"SEARCH.INDEX needs faiss ({error}); install faiss-gpu or faiss-cpu") from None
    return faiss


def paths(folder: Path, collection: str) -> tuple[Path, Path]:
    """Of the index and of its description."""
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
