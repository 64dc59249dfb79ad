"""Google Landmarks v2: retrieval (mAP@100) and recognition (GAP), from its official solution files.

Weyand et al., Google Landmarks Dataset v2, CVPR 2020, section 5. The files are `retrieval_solution_v2.1.csv` (id,
images, Usage) and `recognition_solution_v2.1.csv` (id, landmarks, Usage) at
https://github.com/cvdfoundation/google-landmark. Usage is Public or Private, which are scored apart, or Ignored.
"""

import contextlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.files import sha256_file
from datasets.lists.sources import SourceError, csv_rows, landmark_name, read_csv
from evaler.features.places import find_collection
from evaler.features.provenance import Purpose
from evaler.features.store import Features, FeaturesError, check_alike, check_length, load, read_manifest, some
from evaler.features.top_k import top_k
from evaler.scoring.card import make_card
from evaler.scoring.ranked_metrics import Prediction, average_precisions_at, precisions_of_right
from evaler.scoring.score import Score, Setting

FOUND, VOTING = 100, 5
USAGES = ("Public", "Private")
METRICS = {"retrieval": f"mAP@{FOUND}", "recognition": "GAP"}
NOT_SEEN = {"retrieval": "nothing found", "recognition": "no prediction"}
Solution = dict[str, dict[str, frozenset[str]]]
OfQuery = dict[str, float]  # query -> fraction


def read_solution(path: Path, column: str) -> Solution:
    """Usage -> query -> what is right for it: ids of index images (`images`), or landmarks (`landmarks`).

    Raises `UserError` naming the line for a query that is there twice, another Usage, or, of images, none.
    """
    solution: Solution = {usage: {} for usage in USAGES}
    seen: set[str] = set()
    with contextlib.closing(csv_rows(path)) as rows:
        _, header = next(rows, (1, []))
        if any(header.count(name) != 1 for name in ("id", column, "Usage")):
            raise UserError(f"{path}, line 1: the columns are {','.join(header)[:100]!a}; expected id,{column},Usage")
        for line, row in rows:
            if len(row) != len(header):
                raise UserError(f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}")
            fields = dict(zip(header, row, strict=True))
            query, usage, right = fields["id"], fields["Usage"], fields[column].split()
            if not query or query in seen:
                raise UserError(f"{path}, line {line}: the query {query!a} is empty or there twice")
            seen.add(query)
            if usage == "Ignored":
                continue
            if usage not in USAGES:
                raise UserError(f"{path}, line {line}: Usage {usage!a} is not Public, Private or Ignored")
            if column == "images" and not right:
                raise UserError(f"{path}, line {line}: {query!a} has no images, and is not Ignored")
            try:
                solution[usage][query] = frozenset(right if column == "images" else map(landmark_name, right))
            except SourceError as error:
                raise UserError(f"{path}, line {line}: {error}") from None
    if not any(solution.values()):
        raise UserError(f"{path}: no query that counts")
    return solution


def read_train_labels(path: Path) -> dict[str, str]:
    """Image id -> landmark, from train_clean.csv or train.csv. Raises `UserError` naming file and line."""
    listing = read_csv(path)
    return {image_id(name): listing.class_names[k] for name, k in zip(listing.paths, listing.classes, strict=True)}


def image_id(name: str) -> str:
    """`0/1/2/0123456789abcdef.jpg` -> `0123456789abcdef`."""
    return PurePosixPath(name).stem


def retrieval(queries: Features, index: Features, solution: Solution) -> dict[str, OfQuery]:
    """AP@100 of the queries of each Usage that has some; one that was rejected counts as nothing found.

    Raises `FeaturesError` for a query that is neither described nor rejected.
    """
    scores, ids = {}, list(_rows(index))
    for usage, relevant in solution.items():
        if relevant:
            described, vectors = _of(queries, relevant)
            _, neighbours = top_k(vectors, index.vectors, FOUND)
            names = {query: [ids[i] for i in row] for query, row in zip(described, neighbours, strict=True)}
            scores[usage] = average_precisions_at(names, relevant, FOUND)
    return scores


def recognition(
    queries: Features, train: Features, labels: Mapping[str, str], solution: Solution, *, voting: int = VOTING
) -> dict[str, OfQuery]:
    """What the queries with a landmark of each Usage add to its GAP, which is their mean.

    A query is taken for the landmark whose images among the `voting` nearest have the largest sum of similarities,
    which is its confidence; of equal ones for that of the nearest image. One that was rejected has no prediction.

    Raises `FeaturesError` for a query that is neither described nor rejected, `UserError` for a training image without
    label.
    """
    ids = list(_rows(train))
    if not ids:
        raise UserError("there are no training images to vote")
    missing = [name for name in ids if name not in labels]
    if missing:
        raise UserError(f"no landmark of {some(missing)}, of {len(ids)} training images")
    scores = {}
    for usage, landmarks in solution.items():
        if any(landmarks.values()):
            described, vectors = _of(queries, landmarks)
            similar, neighbours = top_k(vectors, train.vectors, voting)
            predictions = {
                query: vote([labels[ids[i]] for i in row], similarities.tolist())
                for query, row, similarities in zip(described, neighbours, similar, strict=True)
            }
            scores[usage] = precisions_of_right(predictions, landmarks)
    return scores


def vote(landmarks: list[str], similarities: list[float]) -> Prediction:
    """Of the nearest images, nearest first."""
    sums: dict[str, float] = {}
    for landmark, similarity in zip(landmarks, similarities, strict=True):
        sums[landmark] = sums.get(landmark, 0.0) + similarity
    best = max(sums, key=sums.__getitem__)  # the first of equal ones
    return Prediction(best, sums[best])


def _rows(features: Features) -> dict[str, int]:
    """Image id -> row, in the order of the rows. Raises `FeaturesError` where two images have one id."""
    row: dict[str, int] = {}
    for number, name in enumerate(features.names):
        if row.setdefault(image_id(name), number) != number:
            one = features.names[row[image_id(name)]]
            raise FeaturesError(
                f"{one} and {name} have one id, which is the name without folder and ending; remove one"
            )
    return row


def _of(queries: Features, wanted: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Which of these queries have a descriptor, and those in their order; others are not looked at."""
    row, rejected = _rows(queries), _rejected(queries)
    missing = [query for query in wanted if query not in row and query not in rejected]
    if missing:
        raise FeaturesError(f"no descriptor of {len(missing)} queries of the solution: {some(missing)}")
    described = [query for query in wanted if query in row]
    return described, np.asarray(queries.vectors[[row[query] for query in described]], dtype=np.float32)


def _tell_of_absent(index: Features, solution: Solution, place: Path) -> None:
    """A part of the index set scores low, and nothing else would show why."""
    right = set().union(*(images for queries in solution.values() for images in queries.values()))
    absent = right - _rows(index).keys() - _rejected(index)
    if absent:
        print(
            f"note: {len(absent)} of the {len(right)} images that are right for a query are not in {place} and cannot "
            f"be found: {some(sorted(absent))}",
            file=sys.stderr,
        )


def _rejected(queries: Features) -> set[str]:
    return {image_id(entry.name) for entry in queries.rejected} - _rows(queries).keys()


def mean(of_query: OfQuery) -> float:
    """The metric, in percent, of what `retrieval` and `recognition` return."""
    return 100 * float(np.mean(list(of_query.values())))


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def record_of(
    task: str,
    scores: Mapping[str, OfQuery],
    solution: Solution,
    card: dict,
    searched: Features,
    rejected: Mapping[str, int],
) -> Score:
    """The score of a task. Every query of the solution is named, those that do not count too: their values are None."""
    metric, names = METRICS[task], [query for queries in solution.values() for query in queries]
    values = {usage: mean(of_query) for usage, of_query in scores.items()}
    return Score(
        protocol=f"gldv2 {task}",
        metric=metric,
        dataset=card["set"],
        query_names=names,
        settings={
            usage: Setting(usage, {metric: values[usage]}, [_percent(of_query.get(query)) for query in names])
            for usage, of_query in scores.items()
        },
        card=card,
        provenance=searched.provenance,
        counts={"task": task, "scores": values, "rejected": dict(rejected), "searched": len(searched.names)},
    )


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score descriptors by the protocols of Google Landmarks v2.")
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
    for path in (args.solution, args.labels) if args.json else ():
        if path is not None and not path.is_file():
            raise UserError(f"{path}: --json writes its sha256, so it must be a file, not a pipe")
    solution = read_solution(args.solution, "images" if args.task == "retrieval" else "landmarks")
    labels = read_train_labels(args.labels) if args.labels else {}
    asked_place, searched_place = (find_collection(place) for place in (args.queries, args.searched))
    queries, searched = load(*asked_place), load(*searched_place)
    check_alike(str(args.queries), queries, str(args.searched), searched, Purpose.SAME_SPACE)
    for place, features in ((args.queries, queries), (args.searched, searched)):
        check_length(features, str(place))
    if args.task == "retrieval":
        scores = retrieval(queries, searched, solution)
    else:
        scores = recognition(queries, searched, labels, solution, voting=args.voting)
    rejected = {usage: len(_rejected(queries) & solution[usage].keys()) for usage in scores}
    if args.json:  # before anything is printed, which may fail
        card = make_card(
            searched_place[0].name,
            read_manifest(*searched_place),
            queries=sum(map(len, scores.values())),
            ground_truth_sha256=sha256_file(args.solution),
        )
        card |= {"query_set": asked_place[0].name}
        if args.labels:
            card |= {"voting": args.voting, "labels_sha256": sha256_file(args.labels)}
        record_of(args.task, scores, solution, card, searched, rejected).write(args.json)
    for usage, of_query in scores.items():
        score = mean(of_query)
        lost = f", {rejected[usage]} of them rejected: {NOT_SEEN[args.task]}" if rejected[usage] else ""
        counts = f"{len(solution[usage])} queries{lost}, {len(searched.names)} images"
        print(f"  {METRICS[args.task]} {usage:<8}{score:>8.2f}   ({counts})")
    if args.task == "retrieval":
        _tell_of_absent(searched, solution, args.searched)
    if searched.rejected:
        print(f"note: {len(searched.rejected)} images of {args.searched} were rejected and not found", file=sys.stderr)
