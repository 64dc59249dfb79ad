"""Scores of a set of one's own, whose images carry labels: each image is asked for the others of its label."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.environment import entry_point, write_json
from datasets.list_sources import read_csv
from evaler.arguments import find_collection
from evaler.features import Features, check_length, load, some
from evaler.ranked_metrics import average_precision, average_precision_at_r, recall_at
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
    """Name -> label, from a CSV with the columns `path` and `label`. Raises `ValueError` naming file and line."""
    listing = read_csv(path)
    return {name: listing.class_names[k] for name, k in zip(listing.paths, listing.classes.tolist(), strict=True)}


def score_labelled(features: Features, labels: Mapping[str, str], *, kappas: Sequence[int] = KAPPAS) -> dict:
    """Every image is a query against all others (leave one out); those alone under their label are not counted.

    Returns in percent, means over the queries: `recall@k` for each k, `mAP` (mean of the precision at each positive),
    `mAP@R`; and `queries`, `alone`, `images`, `labels`. Equal scores rank by the smaller index.
    Raises `ValueError` for an image without label, and if no label has two images.
    """
    missing = [name for name in features.names if name not in labels]
    if missing:
        raise ValueError(f"no label of {some(missing)}, of {len(features.names)} images")
    members: dict[str, list[int]] = {}
    for index, name in enumerate(features.names):
        members.setdefault(labels[name], []).append(index)
    queries = [index for index, name in enumerate(features.names) if len(members[labels[name]]) > 1]
    if not queries:
        raise ValueError("no label has two images: there is nothing to look for")
    values: dict[str, list[float]] = {key: [] for key in (*(f"recall@{k}" for k in kappas), "mAP", "mAP@R")}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some_queries = queries[start : start + QUERIES_AT_ONCE]
        wanted = [np.array(members[labels[features.names[index]]]) for index in some_queries]
        found = standings(features.vectors[some_queries], features.vectors, wanted)
        for index, images, standing in zip(some_queries, wanted, found, strict=True):
            own = images == index
            ranks = without_junk(standing.ranks[~own], standing.ranks[own])
            for k in kappas:
                values[f"recall@{k}"].append(recall_at(ranks, k))
            values["mAP"].append(average_precision(ranks))
            values["mAP@R"].append(average_precision_at_r(ranks))
    return {key: 100 * float(np.mean(of_all)) for key, of_all in values.items()} | {
        "unit": "percent",
        "queries": len(queries),
        "alone": len(features.names) - len(queries),
        "images": len(features.names),
        "labels": len(members),
    }


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score an extracted set whose images have labels, leaving one out.")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>, or <set>/<collection>")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="columns path,label (default: folders are labels)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the score here")
    args = parser.parse_args(argv)
    folder, collection = find_collection(args.index)
    features = load(folder, collection)
    check_length(features, f"{folder}: {collection}")
    labels = read_labels(args.labels) if args.labels else labels_of_folders(features.names)
    absent = sorted(labels.keys() - set(features.names))
    if absent:
        print(f"note: {args.labels} has labels of images that are not in the set: {some(absent)}", file=sys.stderr)
    score = score_labelled(features, labels)
    print(f"{folder}: {score['images']} images, {score['labels']} labels")
    print(f"{score['queries']} queries; {score['alone']} images are alone under their label and are not asked for\n")
    for key in (*(f"recall@{k}" for k in KAPPAS), "mAP", "mAP@R"):
        print(f"  {key:<10}{score[key]:>8.2f}")
    if args.json:
        write_json(args.json, score | {"provenance": features.provenance})
