"""Search in a Milvus database (SEARCH.URI): a path that ends with .db is the embedded edition, a host a cluster.

https://milvus.io/docs. A Milvus collection holds one state of one extracted collection, which its name tells: the set,
the collection, and the beginning of the descriptors' sha256. Row i is image i, so names stay where they are.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.base.errors import UserError
from core.base.progress import bar
from evaler.features.store import FeaturesError, load, read_manifest
from evaler.indexing.checked_results import check_found, check_scores

CHUNK = 1 << 15  # rows whose presence is asked for at once
BATCH = 1000  # rows sent at once: 2 MB of 512-d descriptors
TIMEOUT = 20.0  # seconds
TOKEN = "MILVUS_TOKEN"  # the environment's, so that no secret stands in a configuration
MOST_FOUND = 16384  # by Milvus at once
ASKED = 256  # queries a request: Milvus takes 16384 at most
ANSWERED = 1 << 18  # images found a request, whose answer would take gigabytes else


class MilvusError(UserError):
    """A database that cannot be used; the message is one line."""


def build(uri: str, folder: Path, collection: str) -> tuple[str, int]:
    """Insert a collection's descriptors, or those that are missing; return the Milvus collection and its size.

    A build that was stopped goes on where it was: chunks are asked for before they are sent, and rows that are there
    are replaced, never doubled. Raises `MilvusError`, also if Milvus does not count in the end what was sent.
    """
    vectors = load(folder, collection).vectors
    name = name_of(folder, collection)
    with _connected(uri) as client:
        if not client.has_collection(name):
            _create(client, name, vectors.shape[1], f"{folder.resolve().name}/{collection}")
        _check_form(client, uri, name, vectors.shape[1])
        client.load_collection(name)
        with bar(None, "inserting", unit="image", total=len(vectors), delay=1, leave=False) as shown:
            for start in range(0, len(vectors), CHUNK):
                stop = min(start + CHUNK, len(vectors))
                there = _count(client, name, f"row >= {start} and row < {stop}")
                send = client.upsert if there else client.insert
                for first in range(start, stop if there < stop - start else start, BATCH):
                    rows = np.asarray(vectors[first : min(first + BATCH, stop)], dtype=np.float32)
                    send(name, [{"row": first + place, "vector": row} for place, row in enumerate(rows)])
                    shown.update(len(rows))
        count = _whole(client, uri, name, len(vectors), mend="run this again")
    return name, count


def search(uri: str, folder: Path, collection: str, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `evaler.features.top_k.top_k`, by the database.

    Raises `MilvusError`, also if the collection is not there whole, and `FeaturesError` for results that are not of
    these descriptors.
    """
    name, vectors = name_of(folder, collection), load(folder, collection).vectors
    k = min(k, len(vectors))
    if k > MOST_FOUND:
        raise MilvusError(f"--top {k}: Milvus finds {MOST_FOUND} images at most")
    mend = "insert it with evaler/index.py"
    with _connected(uri, existing=True) as client:
        if not client.has_collection(name):
            raise MilvusError(f"SEARCH.URI {uri}: does not hold this state of {folder} ({name}); {mend}")
        _check_form(client, uri, name, vectors.shape[1])
        client.load_collection(name)
        _whole(client, uri, name, len(vectors), mend=mend)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        size = max(1, min(ASKED, ANSWERED // max(k, 1)))
        for first in range(0, len(queries), size):
            some = list(np.asarray(queries[first : first + size], np.float32))
            found = client.search(name, data=some, limit=k, consistency_level="Strong")
            if [len(hits) for hits in found] != [k] * len(some):
                raise MilvusError(f"SEARCH.URI {uri}: did not find {k} images for each of {len(some)} queries")
            for place, hits in enumerate(found, start=first):
                scores[place], rows[place] = [hit["distance"] for hit in hits], [hit["row"] for hit in hits]
                order = np.lexsort((rows[place], -scores[place]))
                scores[place], rows[place] = scores[place][order], rows[place][order]
    source = f"SEARCH.URI {uri} ({name})"
    if (rows < 0).any():
        raise MilvusError(f"{source}: found rows that are none of the {len(vectors)} images; drop it, then {mend}")
    check_found(scores, rows, len(vectors), source=source)
    check_scores(queries, vectors, scores, rows, source=source)
    return scores, rows


def _check_form(client, uri: str, name: str, dim: int) -> None:
    """Raise `MilvusError` for a collection of our name that another program made in another way."""
    fields = {field["name"]: field for field in client.describe_collection(name)["fields"]}
    dim_there = fields.get("vector", {}).get("params", {}).get("dim")
    if not fields.get("row", {}).get("is_primary") or dim_there is None or int(dim_there) != dim:
        raise MilvusError(
            f"SEARCH.URI {uri}: the collection {name} has not the fields row and vector of {dim} numbers; drop it"
        )
    metrics = {client.describe_index(name, index).get("metric_type") for index in client.list_indexes(name, "vector")}
    if metrics != {"IP"}:
        metrics_there = ", ".join(sorted(map(str, metrics))) or "none"
        raise MilvusError(
            f"SEARCH.URI {uri}: the collection {name} is searched by the metric {metrics_there}, not IP; drop it"
        )


def _whole(client, uri: str, name: str, expected: int, *, mend: str) -> int:
    """How many rows there are. Raises `MilvusError` unless they are the images' and no others."""
    count, inside = _count(client, name), _count(client, name, f"row >= 0 and row < {expected}")
    if count > inside:
        raise MilvusError(
            f"SEARCH.URI {uri}: {name} holds {count - inside} rows that are no images; drop it, then {mend}"
        )
    if inside != expected:
        raise MilvusError(f"SEARCH.URI {uri}: holds {inside} of {expected} descriptors of {name}; {mend}")
    return count


def name_of(folder: Path, collection: str) -> str:
    """Of the Milvus collection for the present state of a collection. Raises `FeaturesError` if it is incomplete."""
    digest = read_manifest(folder, collection)["sha256"]["npy"]
    place = re.sub(r"[^A-Za-z0-9]", "_", f"{folder.resolve().name}_{collection}")
    return f"dolg_{place[:180]}_{digest[:16]}"


def _create(client, name: str, dim: int, title: str) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=title)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")  # exact
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def _count(client, name: str, which: str = "") -> int:
    answer = client.query(name, filter=which, output_fields=["count(*)"], consistency_level="Strong")
    return int(answer[0]["count(*)"])


@contextlib.contextmanager
def _connected(uri: str, *, existing: bool = False) -> Iterator:
    """A client of pymilvus, whose errors become one line."""
    try:
        import pymilvus  # an optional requirement
    except ImportError as error:
        raise MilvusError(f"SEARCH.URI needs pymilvus ({error}): pip install -r requirements-milvus.txt") from None
    for library in ("pymilvus", "milvus_lite"):  # they print tracebacks of what they also raise
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    if "://" not in uri:
        _check_path(uri, existing=existing)
    try:
        client = pymilvus.MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT)
        try:
            yield client
        finally:
            client.close()
    except (pymilvus.MilvusException, OSError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())[:300]
        hint = "; is another process using it?" if "Open local milvus failed" in reason else ""
        raise MilvusError(f"SEARCH.URI {uri}: {reason}{hint}") from None


def _check_path(uri: str, *, existing: bool) -> None:
    path = Path(uri)
    if path.suffix != ".db":
        raise MilvusError(f"SEARCH.URI {uri}: name a path that ends with .db, or a host (http://HOST:19530)")
    if existing and not path.exists():
        raise FeaturesError(f"SEARCH.URI {uri}: no such database; make it with evaler/index.py")
    if path.is_file():
        raise MilvusError(f"SEARCH.URI {uri}: a file, and no database of the embedded Milvus (milvus-lite >= 3)")
    if not path.parent.is_dir():
        raise MilvusError(f"SEARCH.URI {uri}: there is no folder {path.parent}")
