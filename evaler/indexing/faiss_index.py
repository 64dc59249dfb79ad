"""Approximate search: a faiss index beside a collection, named by its factory string (SEARCH.INDEX).

https://github.com/facebookresearch/faiss/wiki/The-index-factory

Two files: `<collection>.faiss`, and `<collection>.faiss.json` with what it was built from. It belongs to one state of
the descriptors, told by their sha256, and is refused with any other.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from yacs.config import CfgNode

from core.base.errors import UserError
from core.base.files import atomic_write, sha256_file
from core.base.json_files import write_json
from core.base.progress import bar
from evaler.features.store import FeaturesError, chunks, load, read_manifest
from evaler.features.top_k import top_k
from evaler.indexing.checked_results import TOLERANCE, check_found

MOST_TRAINED_ON = 1 << 18
TRIED_ON = 1 << 10  # images that a string is tried on before all are
CELLS = re.compile(r"(?<![A-Za-z])IVF[0-9]+")  # in a factory string
CHECKED = 32  # images that an index is asked for when it is opened
PROBED, PROBED_TOP = 200, 10  # images that the recall is measured with, and at which rank


def build(cfg: CfgNode, folder: Path, collection: str) -> float:
    """Write the index of SEARCH.INDEX; return the part of the exact nearest images that it finds (recall at 10).

    Raises `UserError` for a string that faiss refuses, before anything is built. The index can be used as soon as it
    is written, which is before its recall is measured.
    """
    faiss = search_library()
    vectors = load(folder, collection).vectors
    if not len(vectors):
        raise FeaturesError(f"{folder}: '{collection}' holds no image to index")
    _try_out(cfg, vectors)
    sample = np.sort(np.random.default_rng(0).permutation(len(vectors))[:MOST_TRAINED_ON])
    try:
        index = _of_factory(cfg.SEARCH.INDEX, vectors.shape[1])
        work = faiss.index_cpu_to_all_gpus(index) if _gpus(cfg) else index
        if not work.is_trained:
            work.train(np.asarray(vectors[sample], dtype=np.float32))
        with bar(None, "indexing", unit="image", total=len(vectors), delay=1, leave=False) as shown:
            for _, rows in chunks(vectors):
                work.add(np.asarray(rows, dtype=np.float32))
                shown.update(len(rows))
        index = faiss.index_gpu_to_cpu(work) if _gpus(cfg) else index
    except RuntimeError as error:
        raise UserError(f"SEARCH.INDEX {cfg.SEARCH.INDEX}: faiss refuses it: {_last_line(error)}") from None
    _set_parameters(index, cfg.SEARCH.PARAMETERS)
    path, description_path = paths(folder, collection)
    with atomic_write(path) as file:
        file.write(faiss.serialize_index(index))
        description_path.unlink(missing_ok=True)  # from here to its being written again there is none
    description = {
        "factory": cfg.SEARCH.INDEX,
        "npy_sha256": read_manifest(folder, collection)["sha256"]["npy"],
        "sha256": sha256_file(path),
        "faiss": faiss.__version__,
        "parameters": cfg.SEARCH.PARAMETERS,
    }
    write_json(description_path, description, sort_keys=True)
    recall = measure_recall(index, vectors)
    write_json(description_path, description | {f"recall@{PROBED_TOP}": recall}, sort_keys=True)
    return recall


def _try_out(cfg: CfgNode, vectors: np.ndarray) -> None:
    """Build a small index and search it. Raises `UserError` for what would fail after a whole build."""
    factory = cfg.SEARCH.INDEX
    try:
        _set_parameters(_of_factory(factory, vectors.shape[1]), cfg.SEARCH.PARAMETERS)
        index = _of_factory(CELLS.sub("IVF4", factory), vectors.shape[1])
        _train_quickly(index)
        rows = np.asarray(vectors[:TRIED_ON], dtype=np.float32)
        with threadpool_limits(1):  # more threads are slower on so little
            index.train(rows)
            for half in np.array_split(rows, 2):  # as the whole set is: in batches
                if len(half):
                    index.add(half)
            _set_parameters(index, cfg.SEARCH.PARAMETERS)
            _, neighbours = search(index, rows[:8], PROBED_TOP, source=f"SEARCH.INDEX {factory}")
    except RuntimeError as error:
        if "training points" in str(error) and len(vectors) > TRIED_ON:
            return  # more than are tried: the build begins with the training
        raise UserError(f"SEARCH.INDEX {factory}: faiss refuses it: {_last_line(error)}") from None
    if (neighbours < 0).all():
        raise UserError(f"SEARCH.PARAMETERS {cfg.SEARCH.PARAMETERS}: an index of {factory} finds nothing with them")


def _of_factory(factory: str, dim: int):
    faiss = search_library()
    return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)


def _train_quickly(index) -> None:
    """What is tried need not find well."""
    for part in _parts(index):
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds for each part of a code
        for clustering in (getattr(part, "cp", None), getattr(getattr(part, "pq", None), "cp", None)):
            if clustering is not None:
                clustering.niter, clustering.min_points_per_centroid = 1, 1


def _parts(index) -> Iterator:
    """The index and those inside it, as what they are."""
    faiss, part = search_library(), index  # the whole must live as long as its parts are looked at
    while part is not None:
        part = faiss.downcast_index(part)
        yield part
        part = getattr(part, "base_index", None) or getattr(part, "index", None)


def read(cfg: CfgNode, folder: Path, collection: str):
    """The index of SEARCH.INDEX. Raises `FeaturesError` if it is absent, another one, or of other descriptors."""
    faiss = search_library()
    path, description_path = paths(folder, collection)
    mend = "build it with evaler/index.py"
    try:
        description = json.loads(description_path.read_bytes())
        stated = description["factory"], description["npy_sha256"], description["sha256"]
    except FileNotFoundError:
        raise FeaturesError(f"{path}: no index; {mend}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise FeaturesError(f"{description_path}: not the description of an index; {mend}") from None
    if not all(isinstance(text, str) for text in stated):
        raise FeaturesError(f"{description_path}: not the description of an index; {mend}")
    if stated[0] != cfg.SEARCH.INDEX:
        raise FeaturesError(f"{path}: is {stated[0]}, SEARCH.INDEX {cfg.SEARCH.INDEX}; {mend}")
    if stated[1] != read_manifest(folder, collection)["sha256"]["npy"]:
        raise FeaturesError(f"{path}: of other descriptors than those beside it; {mend}")
    if not path.is_file() or sha256_file(path) != stated[2]:
        raise FeaturesError(f"{path}: missing or damaged (sha256); {mend}")
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise FeaturesError(f"{path}: faiss cannot read it: {_last_line(error)}; {mend}") from None
    _check(index, path, read_manifest(folder, collection), mend)
    _set_parameters(index, cfg.SEARCH.PARAMETERS)
    _check_rows(index, load(folder, collection).vectors, path, mend)
    try:
        return faiss.index_cpu_to_all_gpus(index) if _gpus(cfg) else index
    except RuntimeError as error:  # a kind or a number of cells that GPUs do not search, or too little memory
        raise UserError(f"{path}: faiss cannot search it on a GPU: {_last_line(error)}; set NUM_GPUS 0") from None


def _check_rows(index, vectors: np.ndarray, path: Path, mend: str) -> None:
    """Raise `FeaturesError` for an index whose numbers are those of other images.

    Some images' own descriptors are asked for. An index that compresses gives scores that are near those of the rows it
    names; those of any other rows are further off, by all that the images found are more alike than others.
    """
    asked = np.unique(np.linspace(0, len(vectors) - 1, CHECKED).astype(int))
    queries = np.asarray(vectors[asked], dtype=np.float32)
    scores, rows = search(index, queries, PROBED_TOP, source=str(path))
    there = rows >= 0
    if not there.any():
        return
    others = np.random.default_rng(2).permutation(np.maximum(rows, 0).ravel()).reshape(rows.shape)
    right, wrong = (
        np.abs(np.einsum("qd,qkd->qk", queries, np.asarray(vectors[of], np.float32)) - scores)[there].mean()
        for of in (np.maximum(rows, 0), others)
    )
    # Where all images are alike, compression may be off by as much as they differ.
    if right > max(TOLERANCE, 0.05 * np.abs(scores[there]).mean(), 0.6 * wrong):
        raise FeaturesError(f"{path}: its scores are not those of the images it names; {mend}")


def _check(index, path: Path, manifest: dict, mend: str) -> None:
    """Raise `FeaturesError` for an index that cannot be that of the collection, whatever its description says."""
    faiss = search_library()
    if (index.d, index.ntotal) != (manifest["dim"], manifest["count"]):
        actual, expected = f"{index.ntotal} x {index.d}", f"{manifest['count']} x {manifest['dim']}"
        raise FeaturesError(f"{path}: holds {actual} numbers, the descriptors are {expected}; {mend}")
    if any(isinstance(part, faiss.IndexIDMap) for part in _parts(index)):
        raise FeaturesError(f"{path}: carries numbers of its own for the images; {mend}")
    if any(part.metric_type != faiss.METRIC_INNER_PRODUCT for part in _parts(index)):
        raise FeaturesError(f"{path}: orders by another metric than the inner product; {mend}")


def search(index, queries: np.ndarray, k: int, *, source: str = "SEARCH.INDEX") -> tuple[np.ndarray, np.ndarray]:
    """As `top_k`, by an index; -1 stands where it finds fewer than k.

    Raises `FeaturesError` as `check_found`, `UserError` for what faiss refuses: more than 2048 images on a GPU.
    """
    try:
        scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, index.ntotal))
    except RuntimeError as error:
        raise UserError(f"{source}: faiss refuses it: {_last_line(error)}") from None
    check_found(scores, rows, index.ntotal, source=source)
    return scores, rows


def measure_recall(index, vectors: np.ndarray) -> float:
    """The part of the exact first ten images, each of some images' own left out, that are among its first ten."""
    rows = np.sort(np.random.default_rng(1).permutation(len(vectors))[:PROBED])
    queries = np.asarray(vectors[rows], dtype=np.float32)
    _, exact = top_k(queries, vectors, PROBED_TOP, exclude=rows)
    _, neighbours = search(index, queries, PROBED_TOP + 1)
    if not exact.size:
        return 1.0
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(exact, neighbours, strict=True))
    return hits / exact.size


def search_library():
    """Raises `UserError` where faiss is not installed."""
    try:
        import faiss  # not at the top: few commands need it, and it brings threads of its own
    except ImportError as error:
        raise UserError(f"SEARCH.INDEX needs faiss ({error}); install faiss-gpu or faiss-cpu") from None
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
            raise UserError(f"SEARCH.PARAMETERS {parameters}: faiss refuses it: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    """Of faiss's message, which begins with the place in its code."""
    return " ".join(str(error).split())[-200:]
