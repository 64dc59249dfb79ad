"""Google Landmarks v2: retrieval (mAP@100) and recognition (GAP), from its official solution files.

Weyand et al., Google Landmarks Dataset v2, CVPR 2020, section 5. The files are `retrieval_solution_v2.1.csv` (id,
images, Usage) and `recognition_solution_v2.1.csv` (id, landmarks, Usage) at
https://github.com/cvdfoundation/google-landmark. Usage is Public or Private, which are scored apart, or Ignored.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from core.environment import atomic_write, entry_point
from evaler.collections_on_disk import find_collection
from evaler.features import LIST_KEYS, MACHINE_KEYS, Features, FeaturesError, check_length, differing_keys, load, some
from evaler.labelled_protocol import read_csv
from evaler.ranked_metrics import Prediction, global_average_precision, mean_average_precision_at
from evaler.top_k import top_k

FOUND, VOTING = 100, 5
USAGES = ("Public", "Private")
Solution = dict[str, dict[str, frozenset[str]]]


def read_solution(path: Path, column: str) -> Solution:
    """Usage -> query -> what is right for it: ids of index images (`images`), or landmarks (`landmarks`).

    Raises `ValueError` naming the line for a query that is there twice, another Usage, or, of images, none.
    """
    solution: Solution = {usage: {} for usage in USAGES}
    seen: set[str] = set()
    for number, row in read_csv(path, ("id", column, "Usage")):
        if row["id"] in seen or not row["id"]:
            raise ValueError(f"{path} line {number}: the query {row['id']!a} is empty or there twice")
        seen.add(row["id"])
        if row["Usage"] == "Ignored":
            continue
        if row["Usage"] not in USAGES:
            raise ValueError(f"{path} line {number}: Usage {row['Usage']!a} is not Public, Private or Ignored")
        right = frozenset(row[column].split())
        if not right and column == "images":
            raise ValueError(f"{path} line {number}: {row['id']} has no images, and is not Ignored")
        solution[row["Usage"]][row["id"]] = right
    if not any(solution.values()):
        raise ValueError(f"{path}: no query that counts")
    return solution


def read_train_labels(path: Path) -> dict[str, str]:
    """Image id -> landmark, from train_clean.csv (landmark_id, images) or train.csv (id, url, landmark_id)."""
    labels: dict[str, str] = {}
    for number, row in read_csv(path, ("landmark_id",)):
        images = row["images"].split() if "images" in row else [row["id"]] if "id" in row else None
        if images is None:
            raise ValueError(f"{path} line 1: needs the column images or id")
        for image in images:
            if labels.setdefault(image, row["landmark_id"]) != row["landmark_id"]:
                raise ValueError(f"{path} line {number}: {image} is under {labels[image]} already")
    return labels


def image_id(name: str) -> str:
    """`0/1/2/0123456789abcdef.jpg` -> `0123456789abcdef`."""
    return PurePosixPath(name).stem


def retrieval(queries: Features, index: Features, solution: Solution) -> dict[str, float]:
    """mAP@100 in percent of each Usage that has queries. Raises `FeaturesError` for a query without descriptor."""
    scores = {}
    for usage, relevant in solution.items():
        if relevant:
            _, found = top_k(_of(queries, relevant), index.vectors, FOUND)
            names = {query: [image_id(index.names[i]) for i in row] for query, row in zip(relevant, found, strict=True)}
            scores[usage] = 100 * mean_average_precision_at(names, relevant, FOUND)
    return scores


def recognition(
    queries: Features, train: Features, labels: Mapping[str, str], solution: Solution, *, voting: int = VOTING
) -> dict[str, float]:
    """GAP in percent of each Usage. A query is taken for the landmark whose images among the `voting` nearest have the
    largest sum of similarities, which is its confidence; of equal ones for that of the nearest image.

    Raises `FeaturesError` for a query without descriptor, `ValueError` for a training image without label.
    """
    ids = [image_id(name) for name in train.names]
    missing = [name for name in ids if name not in labels]
    if missing:
        raise ValueError(f"no landmark of {some(missing)}, of {len(ids)} training images")
    scores = {}
    for usage, landmarks in solution.items():
        if any(landmarks.values()):
            similar, found = top_k(_of(queries, landmarks), train.vectors, voting)
            predictions = {
                query: vote([labels[ids[i]] for i in row], similarities.tolist())
                for query, row, similarities in zip(landmarks, found, similar, strict=True)
            }
            scores[usage] = 100 * global_average_precision(predictions, landmarks)
    return scores


def vote(landmarks: list[str], similarities: list[float]) -> Prediction:
    """Of the nearest images, nearest first."""
    sums: dict[str, float] = {}
    for landmark, similarity in zip(landmarks, similarities, strict=True):
        sums[landmark] = sums.get(landmark, 0.0) + similarity
    best = max(sums, key=sums.__getitem__)  # the first of equal ones
    return Prediction(best, sums[best])


def _of(queries: Features, wanted: Mapping[str, object]) -> np.ndarray:
    """The descriptors of these queries, in their order; others are not looked at."""
    row = {image_id(name): number for number, name in enumerate(queries.names)}
    missing = [query for query in wanted if query not in row]
    if missing:
        raise FeaturesError(f"no descriptor of the query {some(missing)}, of {len(wanted)} in the solution")
    return np.asarray(queries.vectors[[row[query] for query in wanted]], dtype=np.float32)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score descriptors by the protocols of Google Landmarks v2.")
    parser.add_argument("task", choices=["retrieval", "recognition"])
    parser.add_argument("solution", type=Path, metavar="SOLUTION.csv", help="the official solution of the task")
    parser.add_argument("queries", type=Path, metavar="QUERIES", help="OUT_DIR/features/<set> of the test images")
    parser.add_argument(
        "searched", type=Path, metavar="SEARCHED", help="of the index images, or of the training images"
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="recognition: train_clean.csv or train.csv")
    parser.add_argument(
        "--voting", type=int, default=VOTING, metavar="K", help=f"recognition: nearest images ({VOTING})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the score here")
    args = parser.parse_args(argv)
    if (args.task == "recognition") != (args.labels is not None):
        parser.error("recognition needs --labels, retrieval takes none")
    if args.voting < 1:
        parser.error(f"--voting {args.voting}: must be at least 1")
    solution = read_solution(args.solution, "images" if args.task == "retrieval" else "landmarks")
    labels = read_train_labels(args.labels) if args.labels else {}
    queries, searched = (load(*find_collection(place)) for place in (args.queries, args.searched))
    differing = differing_keys(queries.provenance, searched.provenance, but=(*LIST_KEYS, *MACHINE_KEYS, "crop_query"))
    if differing:
        raise FeaturesError(f"{args.queries} and {args.searched} differ in {', '.join(differing)}; extract both alike")
    for place, features in ((args.queries, queries), (args.searched, searched)):
        check_length(features, str(place))
    if args.task == "retrieval":
        scores, metric = retrieval(queries, searched, solution), f"mAP@{FOUND}"
    else:
        scores, metric = recognition(queries, searched, labels, solution, voting=args.voting), "GAP"
    for usage, score in scores.items():
        print(f"  {metric} {usage:<8}{score:>8.2f}   ({len(solution[usage])} queries, {len(searched.names)} images)")
    if args.json:
        record = {"task": args.task, "metric": metric, "unit": "percent", "scores": scores}
        record |= {"searched": len(searched.names), "provenance": searched.provenance}
        with atomic_write(args.json) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
