"""Scores of a set of one's own, whose images carry labels: each image is asked for the others of its label, or those of
another set are asked for them."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from datasets.lists.sources import read_csv
from datasets.normalisation import note_on_name
from evaler.features.places import find_collection
from evaler.features.provenance import Purpose
from evaler.features.store import Features, check_alike, check_length, load, read_manifest, some
from evaler.scoring.card import make_card
from evaler.scoring.ranked_metrics import average_precision, average_precision_at_r, recall_at
from evaler.scoring.score import Score, Setting
from evaler.sources.training_list import is_training_list, read_training_list
from revisitop.average_precision import without_junk
from revisitop.streamed_ranks import standings

KAPPAS = (1, 5, 10)
SAME_LABEL = "same"
QUERIES_AT_ONCE = 256
# 1 - cosine of one photograph described twice: on two machines, or stored as float16 (1e-7 to 1e-6).
SAME_DESCRIPTOR = 1e-5


def labels_of_folders(names: Sequence[str]) -> dict[str, str]:
    """Name -> its folder. Raises `UserError` for an image that lies in none."""
    alone = [name for name in names if "/" not in name]
    if alone:
        raise UserError(f"{some(alone)} lies in no folder that could be its label; name a CSV file with --labels")
    return {name: name.rpartition("/")[0] for name in names}


def read_labels(path: Path) -> dict[str, str]:
    """Name -> label, from a CSV with the columns `path` and `label`, or a list file of training (`path label` lines).

    Raises `UserError` naming file and line.
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
    queries, and one that is an image of `features` too (`own_images`) does not find itself. Images for which there is
    nothing to find are not counted.

    Returns in percent, means over the queries: `recall@k` for each k, `mAP` (mean of the precision at each positive),
    `mAP@R`; and `queries`, `alone` (those not counted), `own` (queries apart that are images too), `images`, `labels`;
    and `aps`, the average precision of each query, None for those not counted.
    Equal scores rank by the smaller index.
    Raises `UserError` for an image without label, and if there is nothing to find for any.
    """
    queries, query_labels = asked or (features, labels)
    _check_labels(features, labels)
    _check_labels(queries, query_labels)
    excluded = own_images(queries, features) if asked else {index: [index] for index in range(len(features.names))}
    members: dict[str, list[int]] = {}
    for index, name in enumerate(features.names):
        members.setdefault(labels[name], []).append(index)
    right = [members.get(query_labels[name], []) for name in queries.names]
    counted = [i for i, images in enumerate(right) if set(images) - set(excluded.get(i, ()))]
    if not counted:
        raise UserError(
            "no query has a label that another image has: there is nothing to look for"
            if asked
            else "no label has two images: there is nothing to look for"
        )
    values: dict[str, list[float]] = {key: [] for key in (*(f"recall@{k}" for k in kappas), "mAP", "mAP@R")}
    for start in range(0, len(counted), QUERIES_AT_ONCE):
        some_queries = counted[start : start + QUERIES_AT_ONCE]
        wanted = [np.union1d(right[index], excluded.get(index, [])).astype(np.int64) for index in some_queries]
        ranked = standings(queries.vectors[some_queries], features.vectors, wanted)
        for index, images, standing in zip(some_queries, wanted, ranked, strict=True):
            left_out = np.isin(images, excluded.get(index, []))
            ranks = without_junk(standing.ranks[~left_out], standing.ranks[left_out])
            for k in kappas:
                values[f"recall@{k}"].append(recall_at(ranks, k))
            values["mAP"].append(average_precision(ranks))
            values["mAP@R"].append(average_precision_at_r(ranks))
    aps: list[float | None] = [None] * len(queries.names)
    for index, ap in zip(counted, values["mAP"], strict=True):
        aps[index] = 100 * ap
    return {key: 100 * float(np.mean(of_all)) for key, of_all in values.items()} | {
        "aps": aps,
        "unit": "percent",
        "queries": len(counted),
        "alone": len(queries.names) - len(counted),
        "own": len(excluded) if asked else 0,
        "images": len(features.names),
        "labels": len(members),
    }


def record_of(
    scored: Mapping,
    place: tuple[Path, str],
    features: Features,
    labels: Mapping[str, str],
    *,
    asked: tuple[Features, Mapping[str, str]] | None = None,
) -> Score:
    """The score of what `score_labelled` returned. place: folder and collection of the features."""
    queries, _ = asked or (features, labels)
    parts = [(features, labels), *([asked] if asked else [])]
    lines = "".join(f"{name}\t{of[name]}\n" for some_features, of in parts for name in sorted(some_features.names))
    sha256 = hashlib.sha256(lines.encode()).hexdigest()
    values = {key: value for key, value in scored.items() if key.startswith(("recall@", "mAP"))}
    return Score(
        protocol="labels",
        metric="mAP",
        dataset=place[0].name,
        query_names=list(queries.names),
        settings={SAME_LABEL: Setting("Same label", values, scored["aps"])},
        card=make_card(place[0].name, read_manifest(*place), queries=scored["queries"], ground_truth_sha256=sha256),
        provenance=features.provenance,
        counts={key: value for key, value in scored.items() if key not in ("aps", "unit")},
    )


def own_images(queries: Features, features: Features) -> dict[int, list[int]]:
    """Query -> the images of `features` that are itself: of its file name, its size in pixels, and its descriptor.

    The photographs are not here to be compared byte by byte. The folder of a name does not count, since two sets may
    have been extracted from two places of one tree.
    """
    rows: dict[tuple, list[int]] = {}
    for row, key in enumerate(_keys(features)):
        rows.setdefault(key, []).append(row)
    indices = {}
    for index, key in enumerate(_keys(queries)):
        if key in rows:
            candidates = np.array(rows[key])
            query = np.asarray(queries.vectors[index], dtype=np.float64)
            same = np.asarray(features.vectors[candidates], dtype=np.float64) @ query > 1 - SAME_DESCRIPTOR
            if same.any():
                indices[index] = candidates[same].tolist()
    return indices


def copies(queries: Features, features: Features, excluded: Mapping[int, Sequence[int]]) -> list[str]:
    """Queries whose descriptor is that of an image bit by bit, though the image is not known to be the query itself."""
    rows: dict[bytes, set[int]] = {}
    for row, vector in enumerate(np.asarray(features.vectors)):
        rows.setdefault(vector.astype(np.float32).tobytes(), set()).add(row)
    vectors = enumerate(np.asarray(queries.vectors, dtype=np.float32))
    return [queries.names[i] for i, vector in vectors if rows.get(vector.tobytes(), set()) - set(excluded.get(i, ()))]


def _keys(features: Features) -> Iterator[tuple]:
    """What an image and its copy in another set have in common: file name, width, height."""
    sizes = features.sizes.tolist()
    return ((name.rpartition("/")[2], *size) for name, size in zip(features.names, sizes, strict=True))


def _check_labels(features: Features, labels: Mapping[str, str]) -> None:
    missing = [name for name in features.names if name not in labels]
    if missing:
        note = note_on_name(missing[0], labels)
        raise UserError(f"no label of {some(missing)}, of {len(features.names)} images{note}")


def _load(place: Path, csv: Path | None) -> tuple[Features, dict[str, str]]:
    """A set and its labels, and a note on labels of images that it lacks."""
    folder, collection = find_collection(place)
    features = load(folder, collection)
    check_length(features, f"{folder}: {collection}")
    labels = read_labels(csv) if csv else labels_of_folders(features.names)
    absent = sorted(labels.keys() - set(features.names))
    if absent:
        what = f"labels of {len(absent)} images that are not in the set, of {len(labels)}"
        print(f"note: {csv} has {what}: {some(absent)}", file=sys.stderr)
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
        check_alike(str(args.index), features, str(args.queries), asked[0], Purpose.ADDABLE)
    score = score_labelled(features, labels, asked=asked)
    if args.json:  # before anything is printed, which may fail
        record_of(score, find_collection(args.index), features, labels, asked=asked).write(args.json)
    if asked:
        _tell_of_copies(asked[0], features)
    print(f"{args.index}: {score['images']} images, {score['labels']} labels")
    if asked:
        print(f"{score['queries']} queries of {args.queries}; {score['alone']} have a label that no image has\n")
    else:
        print(
            f"{score['queries']} queries; {score['alone']} images are alone under their label and are not asked for\n"
        )
    for key in (*(f"recall@{k}" for k in KAPPAS), "mAP", "mAP@R"):
        print(f"  {key:<10}{score[key]:>8.2f}")


def _tell_of_copies(queries: Features, features: Features) -> None:
    excluded = own_images(queries, features)
    if excluded:
        names = some([queries.names[index] for index in excluded])
        print(
            f"note: {len(excluded)} queries are images of the set too and do not find themselves: {names}",
            file=sys.stderr,
        )
    alike = copies(queries, features, excluded)
    if alike:
        note = f"have the descriptor of an image of another name or size, which counts: {some(alike)}"
        print(f"note: {len(alike)} queries {note}", file=sys.stderr)
