"""What stands on a page: scores, cards, ranked lists and pictures of one set and one run or two, JSON-able."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from core.base.errors import UserError
from evaler.extraction.command import image_lists
from evaler.features.store import FeaturesError, check_length, load
from evaler.pages.pictures import Gallery, Shown, pictures
from evaler.refinement.steps import Refinement
from evaler.scoring import comparison
from evaler.scoring.card import line, published, with_distractors
from evaler.scoring.labels import labels_of_folders, read_labels, record_of
from evaler.scoring.ranked_lists import SAME, RankedList, mean_curve, own_lists, revisited_lists
from evaler.scoring.revisited import (
    NO_REFINEMENT,
    load_distractors,
    load_set,
    score_loaded,
)
from evaler.scoring.score import Score
from evaler.sources.image_list import ImageList
from evaler.sources.images import DISTRACTORS, distractors, revisited_set
from revisitop import groundtruth
from revisitop.protocol import SETTING_NAMES, SETTINGS

FOLDERS = "folders"


@dataclass(frozen=True)
class Run:
    """name: as on the page; out_dir: where its descriptors lie."""

    name: str
    out_dir: Path
    refinement: Refinement = NO_REFINEMENT


def revisited_page(cfg: CfgNode, name: str, runs: Sequence[Run], shown: Shown) -> dict:
    """The page of a Revisited set, with the distractors behind it if INFER.DATASETS names them.

    Raises as `evaler.scoring.revisited.load_set`, and UserError for runs that cannot be compared.
    """
    gnd_path = groundtruth.path_of(cfg.INFER.DATA_DIR, name)
    truth = groundtruth.load(gnd_path)
    lists, scores, behind = [], [], []
    for run in runs:
        folder = run.out_dir / "features" / name
        behind.append(load_distractors(run.out_dir) if DISTRACTORS in cfg.INFER.DATASETS else None)
        loaded = load_set(folder, truth, distractors=behind[-1], refinement=run.refinement)
        scores.append(score_loaded(loaded, gnd_path, truth, folder, distractors=behind[-1], refinement=run.refinement))
        aps = {setting: scores[-1].settings[setting].per_query for setting in SETTINGS}
        lists.append(revisited_lists(loaded, truth, aps, top=shown.top))
    first = behind[0]
    if first is not None and any(other is None or other.names != first.names for other in behind[1:]):
        raise UserError("the runs have other distractors, or the same in another order: extract them from one list")
    cards = [score.card for score in scores]
    images = revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cards[0]["queries_cropped"] is not False)
    parts: list[tuple[ImageList, Sequence[str]]] = [(images["database"], truth.imlist)]
    if first is not None:
        parts.append((distractors(cfg.INFER.DATA_DIR), first.names))
    chosen = spread(len(truth.qimlist), shown.queries)
    cropped = {True: " (cropped)", False: " (not cropped)"}.get(cards[0]["queries_cropped"], "")
    settings = [
        {"key": key, "name": SETTING_NAMES[key], "right": right, "ignored": ignored}
        for key, (right, ignored) in SETTINGS.items()
    ]
    return {
        "title": f"{name}{with_distractors(cards[0]['distractors'])}",
        "counts": f"{len(truth.qimlist):,} queries{cropped}, {len(truth.imlist):,} database images"
        + (f"; {len(chosen):,} of the queries are shown" if len(chosen) < len(truth.qimlist) else ""),
        "settings": settings,
        "runs": [{"name": run.name, "card": card, "line": line(card)} for run, card in zip(runs, cards, strict=True)],
        "table": score_table(scores),
        "curves": _curves(lists, settings),
        **pictures(
            cfg,
            [(truth.qimlist[index], (images["queries"], index)) for index in chosen],
            [[of_run[index] for index in chosen] for of_run in lists],
            Gallery(parts),
            [score.provenance for score in scores],
            shown,
        ),
    }


def own_page(cfg: CfgNode, runs: Sequence[Run], shown: Shown, *, labels: str) -> dict:
    """The page of INFER.IMAGES: some images as queries against all others.

    labels: a CSV file with path and label, `folders`, or empty. Raises `FeaturesError` for descriptors that cannot be
    used and for runs of other images, UserError for an image without label.
    """
    ((name, collections),) = image_lists(cfg).items()
    folders = [run.out_dir / "features" / name for run in runs]
    found = [load(folder, "images") for folder in folders]
    for run, features in zip(runs, found, strict=True):
        check_length(features, f"{run.out_dir / 'features' / name}: images")
        if features.names != found[0].names:
            raise FeaturesError(f"{run.out_dir}: its images of {name} are others than those in {runs[0].out_dir}")
    names, label_of = found[0].names, None
    if labels:
        label_of = labels_of_folders(names) if labels == FOLDERS else read_labels(Path(labels))
    asked = list(range(len(names)))
    if label_of:
        members = Counter(label_of.get(image) for image in names)
        asked = [index for index in asked if members[label_of.get(names[index])] > 1]
    asked = [asked[place] for place in spread(len(asked), shown.queries)]
    lists, scores = zip(*(own_lists(features, asked, label_of, top=shown.top) for features in found), strict=True)
    records = []
    if label_of:
        made = zip(scores, folders, found, strict=True)
        records = [record_of(score, (folder, "images"), of, label_of) for score, folder, of in made]
    settings = [{"key": SAME, "name": "Same label", "right": [SAME], "ignored": []}] if label_of else []
    cards = [{"set": name, "gallery": len(names), "dim": f.vectors.shape[1], **f.provenance.to_json()} for f in found]
    gallery = Gallery([(collections["images"], names)])
    return {
        "title": name,
        "counts": f"{len(names):,} images, {f'{len(members):,} labels' if label_of else 'without labels'}; "
        f"{len(asked):,} of them as queries",
        "settings": settings,
        "runs": [{"name": run.name, "card": card, "line": ""} for run, card in zip(runs, cards, strict=True)],
        "table": score_table(records) if label_of else None,
        "curves": _curves(lists, settings),
        **pictures(
            cfg,
            [(names[index], gallery.photo(index)) for index in asked],
            lists,
            gallery,
            [features.provenance for features in found],
            shown,
        ),
    }


def spread(count: int, most: int) -> list[int]:
    """Indices below `count`, evenly spread, `most` of them at most; 0: all."""
    if not most or most >= count:
        return list(range(count))
    return [place * count // most for place in range(most)]


def score_table(scores: Sequence[Score]) -> dict:
    """`columns`, and `rows` with the name of a setting, `values` (run -> column), what was published (mAP, or None),
    how many queries count, and with two runs how far they differ."""
    differences = comparison.compare(*scores) if len(scores) == 2 else {}
    of_paper = dict(zip("MH", published(scores[0].card) or (), strict=False))
    rows = [
        {
            "name": setting.name,
            "values": [list(score.columns(key).values()) for score in scores],
            "published": of_paper.get(key),
            "counted": setting.counted,
            "difference": differences.get(key, {}).get("difference"),
        }
        for key, setting in scores[0].settings.items()
    ]
    return {"columns": list(scores[0].columns(next(iter(scores[0].settings)))), "rows": rows}


def _curves(lists: Sequence[Sequence[RankedList]], settings: Sequence[dict]) -> list[dict]:
    return [{setting["key"]: mean_curve(of_run, setting["key"]) for setting in settings} for of_run in lists]
