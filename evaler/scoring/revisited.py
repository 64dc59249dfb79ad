"""From descriptors and ground truth to the table of a paper, on the terminal and as JSON."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from yacs.config import CfgNode

from core.arguments import load_cfg_from_args
from core.base.errors import UserError, entry_point
from core.base.files import sha256_file
from evaler.features.provenance import Provenance, Purpose
from evaler.features.rows import Stacked
from evaler.features.store import Features, align, check_alike, check_length, load, read_manifest, some
from evaler.refinement.steps import Refinement
from evaler.scoring.card import line, make_card, network_name, published, with_distractors
from evaler.scoring.score import REVISITED, Score, Setting
from evaler.sources.images import DISTRACTORS
from revisitop import groundtruth, protocol
from revisitop.groundtruth import GroundTruth
from revisitop.scores import Rows

KAPPAS = (1, 5, 10)
NO_REFINEMENT = Refinement()
SHOWN_BRACKET = 0.005  # points of mAP


class LoadedSet(NamedTuple):
    """A set ready to be ranked.

    queries: [Q, D]; gallery: the database in the order of the ground truth, then distractors, [N, D]; first: int64
    [Q, M], see `Step.ranking`; provenance: what queries and database have in common.
    """

    queries: np.ndarray
    gallery: Rows
    first: np.ndarray | None
    provenance: Provenance


def load_set(
    folder: str | os.PathLike,
    ground_truth: GroundTruth,
    *,
    distractors: Features | None = None,
    refinement: Refinement = NO_REFINEMENT,
) -> LoadedSet:
    """The collections `queries` and `database` in `folder`, the latter with `distractors` behind it, refined.

    Raises `FeaturesError` if a collection is incomplete, was extracted in another way than the other, has not exactly
    the images of the ground truth, or holds vectors that are not finite and of length 1.
    """
    folder = Path(folder)
    queries, database = load(folder, "queries"), load(folder, "database")
    check_alike(f"{folder}: queries", queries, "database", database, Purpose.SAME_RUN)
    aligned = []
    for collection, features, names in (
        ("queries", queries, ground_truth.qimlist),
        ("database", database, ground_truth.imlist),
    ):
        source = f"{folder}: {collection}"
        check_length(features, source)
        aligned.append(np.asarray(align(features, names, source=source), np.float32))
    if distractors is not None:
        check_alike(f"{folder}: database", database, DISTRACTORS, distractors, Purpose.SAME_SPACE)
    gallery = Stacked([aligned[1], *([] if distractors is None else [distractors.vectors])])
    refinement.check(database)
    return LoadedSet(*refinement.apply(aligned[0], gallery), database.provenance.relevant(Purpose.SAME_RUN))


def score_features(
    loaded: LoadedSet, ground_truth: GroundTruth, *, kappas: Sequence[int] = KAPPAS
) -> dict[str, Setting]:
    """For "E", "M" and "H": `mAP`, `mAP_bracket` (a list: the least and the largest that another order of equal
    scores gives) and `mP@k` (a list), in percent; the value of a query is its average precision. None where no query,
    or this one, has positives.
    """
    fractions = protocol.evaluate(loaded.queries, loaded.gallery, ground_truth, kappas, first=loaded.first)
    return {
        key: Setting(
            protocol.SETTING_NAMES[key],
            {
                "mAP": _percent(values["mAP"]),
                "mAP_bracket": [_percent(value) for value in values["mAP_bracket"]],
                "mP@k": [_percent(value) for value in values["mP@k"]],
            },
            [_percent(value) for value in values["aps"]],
        )
        for key, values in fractions.items()
    }


def table(score: Score) -> str:
    """The score of a set as text for a terminal."""
    provenance, card, queries = score.provenance, score.card, score.counts["queries"]
    counts = f"{queries} queries{_cropped(provenance)}, {score.counts['database']} database images"
    origin = f"weights {network_name(provenance.weights, provenance.weights_sha256)}"
    if provenance.scales is not None:
        origin += f", scales {' '.join(f'{scale:g}' for scale in provenance.scales)}"
    rows = {key: score.columns(key) for key in score.settings}
    heads = "".join(f"{head:>9}" for head in next(iter(rows.values())))
    lines = [f"{score.dataset}{with_distractors(card['distractors'])}: {counts}", origin, "", " " * 10 + heads]
    for key, setting in score.settings.items():
        cells = "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in rows[key].values())
        note = "" if setting.counted == queries else f"   ({setting.counted} of {queries} queries have positives)"
        lines.append(f"  {setting.name:<8}{cells}{note}")
        low, high = setting.values["mAP_bracket"]
        if low is not None and high - low > SHOWN_BRACKET:
            lines.append(
                f"          equal scores: {low:.2f} to {high:.2f}, by their order (here the smaller index first)"
            )
    if paper := published(card):
        how = "cropped" if card["queries_cropped"] else "not cropped"
        lines.append(
            f"  DOLG R{card['depth']} as published (queries {how}): Medium {paper[0]:.2f}, Hard {paper[1]:.2f}"
        )
    return "\n".join([*lines, "", f"  {line(card)}"])


def score_set(
    name: str,
    data_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    distractors: Features | None = None,
    refinement: Refinement = NO_REFINEMENT,
) -> tuple[Score, Path]:
    """Score one extracted set and write `<out_dir>/scores/<name>.json`; returns what is written, and where.

    With distractors the file is `<name>_with_distractors.json`, and `_processed` is put behind it with refinement.
    """
    gnd_path = groundtruth.path_of(data_dir, name)
    ground_truth = groundtruth.load(gnd_path)
    folder = Path(out_dir) / "features" / name
    loaded = load_set(folder, ground_truth, distractors=distractors, refinement=refinement)
    score = score_loaded(loaded, gnd_path, ground_truth, folder, distractors=distractors, refinement=refinement)
    suffix = f"{'_with_distractors' if distractors else ''}{'_processed' if refinement else ''}"
    path = Path(out_dir) / "scores" / f"{name}{suffix}.json"
    score.write(path)
    return score, path


def score_loaded(
    loaded: LoadedSet,
    gnd_path: Path,
    ground_truth: GroundTruth,
    folder: Path,
    *,
    distractors: Features | None = None,
    refinement: Refinement = NO_REFINEMENT,
) -> Score:
    """The score of what `load_set` has loaded from OUT_DIR/features/<set>, with its card: what `score_set` writes."""
    name = folder.name
    manifests = [read_manifest(folder, "database"), read_manifest(folder, "queries")]
    if distractors is not None:
        manifests.append(read_manifest(folder.parent / DISTRACTORS, "distractors"))
    card = make_card(
        name,
        manifests[0],
        queries=len(ground_truth.qimlist),
        distractors=len(distractors.names) if distractors else 0,
        ground_truth_sha256=sha256_file(gnd_path),
        post_processing=refinement.lines([manifest["sha256"]["npy"] for manifest in manifests]),
    )
    return Score(
        protocol=REVISITED,
        metric="mAP",
        dataset=name,
        query_names=list(ground_truth.qimlist),
        settings=score_features(loaded, ground_truth),
        card=card,
        provenance=loaded.provenance,
        counts={
            "kappas": list(KAPPAS),
            "queries": len(ground_truth.qimlist),
            "database": len(ground_truth.imlist),
        },
    )


@entry_point
def main(argv: list[str] | None = None) -> None:
    cfg = load_cfg_from_args("Score the descriptors of Revisited sets (easy / medium / hard).", argv)
    if cfg.INFER.IMAGES:
        raise UserError(f"INFER.IMAGES {cfg.INFER.IMAGES}: a folder has no ground truth, so there is nothing to score")
    if not cfg.INFER.DATASETS:
        raise UserError("INFER.DATASETS is empty: there is nothing to score")
    sets = [name for name in cfg.INFER.DATASETS if name != DISTRACTORS]
    if not sets:
        raise UserError(f"INFER.DATASETS names {DISTRACTORS} alone, which has no queries; name a set to score with it")
    refinement = Refinement.of(cfg)
    distractors = load_distractors(cfg.OUT_DIR) if DISTRACTORS in cfg.INFER.DATASETS else None
    for name in sets:
        for behind in (None, distractors) if distractors else (None,):
            score, path = score_set(name, cfg.INFER.DATA_DIR, cfg.OUT_DIR, distractors=behind, refinement=refinement)
            if behind is None:
                _tell_of_other_settings(cfg, score)
                _tell_of_own_queries(name, groundtruth.path_of(cfg.INFER.DATA_DIR, name))
            print(f"\n{table(score)}\n\n  written to {path}")


def load_distractors(out_dir: str | os.PathLike) -> Features:
    """The descriptors of the distractors, checked. Raises `FeaturesError`."""
    folder = Path(out_dir) / "features" / DISTRACTORS
    distractors = load(folder, "distractors")
    check_length(distractors, f"{folder}: distractors")
    if distractors.rejected:
        count = len(distractors.rejected)
        print(f"note: {count} distractors were rejected when they were extracted and are not scored", file=sys.stderr)
    return distractors


def _tell_of_other_settings(cfg: CfgNode, score: Score) -> None:
    how, infer = score.provenance, cfg.INFER
    for key, extracted, value in (
        ("SCALES", None if how.scales is None else list(how.scales), list(infer.SCALES)),
        ("CROP_QUERY", how.crop_query, infer.CROP_QUERY),
    ):
        if extracted is not None and extracted != value:
            note = f"was extracted with INFER.{key} {extracted}, not {value} as configured"
            print(f"note: {score.dataset} {note}", file=sys.stderr)


def _tell_of_own_queries(name: str, gnd_path: Path) -> None:
    unlabelled = groundtruth.unlabelled_queries(groundtruth.load(gnd_path))
    if unlabelled:
        note = f"are database images too without a label for themselves, so each counts as wrong: {some(unlabelled)}"
        print(f"note: {len(unlabelled)} queries of {name} {note}", file=sys.stderr)


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * float(fraction)


def _cropped(provenance: Provenance) -> str:
    return {True: " (cropped)", False: " (not cropped)", None: ""}[provenance.crop_query]
