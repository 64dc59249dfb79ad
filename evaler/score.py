"""From descriptors and ground truth to the table of a paper, on the terminal and as JSON."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.config import load_cfg_from_args
from core.environment import atomic_write, entry_point, sha256_file
from evaler.features import LIST_KEYS, Features, FeaturesError, align, chunks, differing_keys, load
from evaler.images import DISTRACTORS
from revisitop import groundtruth, protocol
from revisitop.groundtruth import GroundTruth

KAPPAS = (1, 5, 10)
SETTING_NAMES = {"E": "Easy", "M": "Medium", "H": "Hard"}
# float32 normalisation is exact to 1e-7, half precision to 1e-3.
NORM_TOLERANCE = 2e-3


def score_features(
    folder: str | os.PathLike, ground_truth: GroundTruth, *, kappas: Sequence[int] = KAPPAS
) -> dict[str, dict]:
    """Score the collections `queries` and `database` in `folder`.

    Returns for "E", "M" and "H": `mAP`, `mP@k` (a list) and `aps` (a list, a query each) in percent, None where no
    query, or this one, has positives; and `provenance`, what the two collections have in common.
    Raises `FeaturesError` if a collection is incomplete, was extracted in another way than the other, has not exactly
    the images of the ground truth, or holds vectors that are not finite and of length 1.
    """
    folder = Path(folder)
    queries, database = load(folder, "queries"), load(folder, "database")
    differing = differing_keys(queries.provenance, database.provenance, but=LIST_KEYS)
    if differing:
        raise FeaturesError(
            f"{folder}: queries and database differ in {', '.join(differing)}; extract both in the same way"
        )
    if queries.vectors.shape[1] != database.vectors.shape[1]:
        raise FeaturesError(
            f"{folder}: queries have dimension {queries.vectors.shape[1]}, "
            f"the database {database.vectors.shape[1]}; extract both in the same way"
        )
    aligned = []
    for collection, features, names in (
        ("queries", queries, ground_truth.qimlist),
        ("database", database, ground_truth.imlist),
    ):
        source = f"{folder}: {collection}"
        _check_length(features, source)
        aligned.append(np.asarray(align(features, names, source=source), np.float32))
    fractions = protocol.evaluate(*aligned, ground_truth, kappas)
    result: dict[str, dict] = {
        setting: {
            "mAP": _percent(values["mAP"]),
            "mP@k": [_percent(value) for value in values["mP@k"]],
            "aps": [_percent(value) for value in values["aps"]],
        }
        for setting, values in fractions.items()
    }
    result["provenance"] = {key: value for key, value in database.provenance.items() if key not in LIST_KEYS}
    return result


def table(score: dict) -> str:
    """The score of a set, as `score_set` returns it, as text for a terminal."""
    provenance = score["provenance"]
    counts = f"{score['queries']} queries{_cropped(provenance)}, {score['database']} database images"
    origin = f"weights {_weights(provenance)}"
    if "scales" in provenance:
        origin += f", scales {' '.join(f'{scale:g}' for scale in provenance['scales'])}"
    heads = ["mAP", *(f"mP@{kappa}" for kappa in score["kappas"])]
    lines = [f"{score['dataset']}: {counts}", origin, "", " " * 10 + "".join(f"{head:>9}" for head in heads)]
    for setting, name in SETTING_NAMES.items():
        values = [score[setting]["mAP"], *score[setting]["mP@k"]]
        cells = "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in values)
        counted = sum(ap is not None for ap in score[setting]["aps"])
        note = "" if counted == score["queries"] else f"   ({counted} of {score['queries']} queries have positives)"
        lines.append(f"  {name:<8}{cells}{note}")
    return "\n".join(lines)


def score_set(name: str, data_dir: str | os.PathLike, out_dir: str | os.PathLike) -> dict:
    """Score one extracted set and write `<out_dir>/scores/<name>.json`; returns what is written there."""
    gnd_path = Path(data_dir) / name / f"gnd_{name}.pkl"
    ground_truth = groundtruth.load(gnd_path)
    score = {
        "unit": "percent",
        "dataset": name,
        "kappas": list(KAPPAS),
        "queries": len(ground_truth.qimlist),
        "database": len(ground_truth.imlist),
        **score_features(Path(out_dir) / "features" / name, ground_truth),
        "ground_truth_sha256": sha256_file(gnd_path),
    }
    with atomic_write(Path(out_dir) / "scores" / f"{name}.json") as file:
        file.write(json.dumps(score, indent=1, allow_nan=False).encode() + b"\n")
    return score


@entry_point
def main(argv: list[str] | None = None) -> None:
    cfg = load_cfg_from_args("Score the descriptors of Revisited sets (easy / medium / hard).", argv)
    if cfg.INFER.IMAGES:
        raise ValueError(f"INFER.IMAGES {cfg.INFER.IMAGES}: a folder has no ground truth, so there is nothing to score")
    if not cfg.INFER.DATASETS:
        raise ValueError("INFER.DATASETS is empty: there is nothing to score")
    if DISTRACTORS in cfg.INFER.DATASETS:
        print(f"note: {DISTRACTORS} has no queries and is not scored by itself", file=sys.stderr)
    for name in cfg.INFER.DATASETS:
        if name == DISTRACTORS:
            continue
        score = score_set(name, cfg.INFER.DATA_DIR, cfg.OUT_DIR)
        configured = {"scales": cfg.INFER.SCALES, "crop_query": cfg.INFER.CROP_QUERY}
        for key, value in configured.items():
            extracted = score["provenance"].get(key, value)
            if extracted != value:
                key = f"INFER.{key.upper()}"
                print(f"note: {name} was extracted with {key} {extracted}, not {value} as configured", file=sys.stderr)
        print(f"\n{table(score)}\n\n  written to {Path(cfg.OUT_DIR) / 'scores' / name}.json")


def _check_length(features: Features, source: str) -> None:
    for start, rows in chunks(features.vectors):
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        bad = np.flatnonzero(np.abs(norms - 1) > NORM_TOLERANCE)
        if len(bad):
            name, norm = features.names[start + bad[0]], norms[bad[0]]
            what = "is zero" if norm == 0 else f"has length {norm:.4g}, not 1"
            raise FeaturesError(f"{source}: the descriptor of {name} {what} (one of {len(bad)}); extract it again")


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * float(fraction)


def _weights(provenance: dict) -> str:
    """File name and the beginning of the sha256."""
    name = Path(provenance.get("weights") or "unknown").name
    return f"{name} (sha256 {provenance['weights_sha256'][:8]})" if provenance.get("weights_sha256") else name


def _cropped(provenance: dict) -> str:
    return {True: " (cropped)", False: " (not cropped)"}.get(provenance.get("crop_query"), "")
