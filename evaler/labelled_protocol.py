"""Scores of a set of one's own, whose images carry labels: each image is asked for the others of its label, or those of
another set are asked for them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.arguments import Parser
from core.environment import entry_point, write_json
from datasets.list_sources import read_csv
from datasets.normalisation import note_on_name
from evaler.arguments import find_collection
from evaler.features import Features, check_length, load, some
from evaler.provenance import LIST_KEYS, MACHINE_KEYS, check_alike
from evaler.ranked_metrics import average_precision, average_precision_at_r, recall_at
from evaler.training_list import is_training_list, read_training_list
from revisitop.average_precision import without_junk
from revisitop.streamed_ranks import standings

KAPPAS = (1, 5, 10)
QUERIES_AT_ONCE = 256


def labels_of_folders(names: Sequence[str]) -> dict[str, str]:
    """Name -> its folder. Raises `ValueError` for an image that lies in none."""
    alone = [name for name in names if "/" not in name]
    if alone:
        raise ValueError(f"{some(alone)} lies in no folder that could be its label; name a CSV file with --labels")
    return {name: name.rpartition("/")[0] for name in names}


def read_labels(path: Path) -> dict[str, str]:
    """Name -> label, from a CSV with the columns `path` and `label`, or a list file of training (`path label` lines).

    Raises `ValueError` naming file and line.
    """
    if path.is_file() and is_training_list(path):
        names, _, numbers = read_training_list(path)
        return dict(zip(names, map(str, numbers.tolist()), strict=True))
    listing = read_csv(path)
    return {name: listing.class_names[k] for name, k in zip(listing.paths, listing.classes.tolist(), strict=True)}


def score_labelled(
    features: Features,
    labels: Mapping[str, str],
    *,
    asked: tuple[Features, Mapping[str, str]] | None = None,
    kappas: Sequence[int] = KAPPAS,
) -> dict:
    """Every image is a query against all others (leave one out); or those of `asked`, with their labels, are the
    queries. Images for which there is nothing to find are not counted.

    Returns in percent, means over the queries: `recall@k` for each k, `mAP` (mean of the precision at each positive),
    `mAP@R`; and `queries`, `alone` (those not counted), `images`, `labels`. Equal scores rank by the smaller index.
    Raises `ValueError` for an image without label, and if there is nothing to find for any.
    """
    queries, query_labels = asked or (features, labels)
    _check_labels(features, labels)
    _check_labels(queries, query_labels)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(features.names):
        members.setdefault(labels[name], []).append(index)
    own = 0 if asked else 1
    counted = [i for i, name in enumerate(queries.names) if len(members.get(query_labels[name], ())) > own]
    if not counted:
        raise ValueError(
            "no query has a label that an image has: there is nothing to look for"
            if asked
            else "no label has two images: there is nothing to look for"
        )
    values: dict[str, list[float]] = {key: [] for key in (*(f"recall@{k}" for k in kappas), "mAP", "mAP@R")}
    for start in range(0, len(counted), QUERIES_AT_ONCE):
        some_queries = counted[start : start + QUERIES_AT_ONCE]
        wanted = [np.array(members[query_labels[queries.names[index]]]) for index in some_queries]
        found = standings(queries.vectors[some_queries], features.vectors, wanted)
        for index, images, standing in zip(some_queries, wanted, found, strict=True):
            left_out = np.zeros(len(images), bool) if asked else images == index
            ranks = without_junk(standing.ranks[~left_out], standing.ranks[left_out])
            for k in kappas:
                values[f"recall@{k}"].append(recall_at(ranks, k))
            values["mAP"].append(average_precision(ranks))
            values["mAP@R"].append(average_precision_at_r(ranks))
    return {key: 100 * float(np.mean(of_all)) for key, of_all in values.items()} | {
        "unit": "percent",
        "queries": len(counted),
        "alone": len(queries.names) - len(counted),
        "images": len(features.names),
        "labels": len(members),
    }


def _check_labels(features: Features, labels: Mapping[str, str]) -> None:
    missing = [name for name in features.names if name not in labels]
    if missing:
        note = note_on_name(missing[0], labels)
        raise ValueError(f"no label of {some(missing)}, of {len(features.names)} images{note}")


def _load(place: Path, csv: Path | None) -> tuple[Features, dict[str, str]]:
    """A set and its labels, and a note on labels of images that it lacks."""
    folder, collection = find_collection(place)
    features = load(folder, collection)
    check_length(features, f"{folder}: {collection}")
    labels = read_labels(csv) if csv else labels_of_folders(features.names)
    absent = sorted(labels.keys() - set(features.names))
    if absent:
        print(f"note: {csv} has labels of images that are not in the set: {some(absent)}", file=sys.stderr)
    return features, labels


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score an extracted set whose images have labels.")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>, or <set>/<collection>")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="a CSV with the columns path,label, or a list file of training (default: folders are labels)",
    )
    parser.add_argument(
        "--queries", type=Path, metavar="SET", help="another extracted set, that asks (default: each image of INDEX)"
    )
    parser.add_argument("--query-labels", type=Path, metavar="FILE", help="of these (default: folders are labels)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the score here")
    args = parser.parse_args(argv)
    if args.query_labels and not args.queries:
        parser.error("--query-labels without --queries")
    features, labels = _load(args.index, args.labels)
    asked = _load(args.queries, args.query_labels) if args.queries else None
    if asked:
        check_alike(str(args.index), features, str(args.queries), asked[0], but=(*LIST_KEYS, *MACHINE_KEYS))
    score = score_labelled(features, labels, asked=asked)
    print(f"{args.index}: {score['images']} images, {score['labels']} labels")
    if asked:
        print(f"{score['queries']} queries of {args.queries}; {score['alone']} have a label that no image has\n")
    else:
        print(
            f"{score['queries']} queries; {score['alone']} images are alone under their label and are not asked for\n"
        )
    for key in (*(f"recall@{k}" for k in KAPPAS), "mAP", "mAP@R"):
        print(f"  {key:<10}{score[key]:>8.2f}")
    if args.json:
        write_json(args.json, score | {"provenance": features.provenance})
