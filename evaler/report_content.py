"""What stands on a page: scores, cards, ranked lists and pictures of one set and one run or two, JSON-able."""

import base64
import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from yacs.config import CfgNode

from core.counter import bar
from datasets.image import ImageError
from evaler import comparison
from evaler.attention_maps import attention_of, load_network
from evaler.card import line, published, with_distractors
from evaler.extract import image_lists
from evaler.features import FeaturesError, check_length, load
from evaler.image_list import ImageList
from evaler.images import DISTRACTORS, distractors, revisited_set
from evaler.labelled_protocol import KAPPAS, labels_of_folders, read_labels
from evaler.post_processing import PostProcessing
from evaler.ranked_lists import SAME, RankedList, mean_curve, own_lists, revisited_lists
from evaler.score import NO_POST_PROCESSING, SETTING_NAMES, load_distractors, load_set, score_loaded, truth_path
from evaler.thumbnails import heat, thumbnails
from revisitop import groundtruth
from revisitop.protocol import SETTINGS

RESULT, QUERY = (256, 192), (480, 360)  # largest width and height of their pictures
FOLDERS = "folders"


@dataclass(frozen=True)
class Run:
    """name: as on the page; out_dir: where its descriptors lie."""

    name: str
    out_dir: Path
    post: PostProcessing = NO_POST_PROCESSING


@dataclass(frozen=True)
class Shown:
    """How much a page shows. queries: at most, 0 for all; missed: right images that come later, at most."""

    top: int = 20
    queries: int = 0
    missed: int = 10
    attention: bool = True


def revisited_page(cfg: CfgNode, name: str, runs: Sequence[Run], shown: Shown) -> dict:
    """The page of a Revisited set, with the distractors behind it if INFER.DATASETS names them.

    Raises as `evaler.score.load_set`, and ValueError for runs that cannot be compared.
    """
    gnd_path = truth_path(cfg.INFER.DATA_DIR, name)
    truth = groundtruth.load(gnd_path)
    lists, scores, behind = [], [], []
    for run in runs:
        folder = run.out_dir / "features" / name
        behind.append(load_distractors(run.out_dir) if DISTRACTORS in cfg.INFER.DATASETS else None)
        loaded = load_set(folder, truth, distractors=behind[-1], post=run.post)
        scores.append(score_loaded(loaded, gnd_path, truth, folder, distractors=behind[-1], post=run.post))
        aps = {setting: scores[-1][setting]["aps"] for setting in SETTINGS}
        lists.append(revisited_lists(loaded, truth, aps, top=shown.top))
    if behind[0] is not None and any(other.names != behind[0].names for other in behind[1:]):
        raise ValueError("the runs have other distractors, or the same in another order: extract them from one list")
    cards = [score["card"] for score in scores]
    images = revisited_set(cfg.INFER.DATA_DIR, name, crop_query=cards[0]["queries_cropped"] is not False)
    parts = [(images["database"], truth.imlist)]
    if behind[0] is not None:
        parts.append((distractors(cfg.INFER.DATA_DIR), behind[0].names))
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
        "table": revisited_table(scores),
        "curves": _curves(lists, settings),
        **pictures(
            cfg,
            [(truth.qimlist[index], (images["queries"], index)) for index in chosen],
            [[of_run[index] for index in chosen] for of_run in lists],
            Gallery(parts),
            [score["provenance"] for score in scores],
            shown,
        ),
    }


def own_page(cfg: CfgNode, runs: Sequence[Run], shown: Shown, *, labels: str) -> dict:
    """The page of INFER.IMAGES: some images as queries against all others.

    labels: a CSV file with path and label, `folders`, or empty. Raises `FeaturesError` for descriptors that cannot be
    used and for runs of other images, ValueError for an image without label.
    """
    ((name, collections),) = image_lists(cfg).items()
    found = [load(run.out_dir / "features" / name, "images") for run in runs]
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
    settings = [{"key": SAME, "name": "Same label", "right": [SAME], "ignored": []}] if label_of else []
    cards = [{"set": name, "gallery": len(names), "dim": f.vectors.shape[1], **f.provenance} for f in found]
    gallery = Gallery([(collections["images"], names)])
    return {
        "title": name,
        "counts": f"{len(names):,} images, {f'{len(members):,} labels' if label_of else 'without labels'}; "
        f"{len(asked):,} of them as queries",
        "settings": settings,
        "runs": [{"name": run.name, "card": card, "line": ""} for run, card in zip(runs, cards, strict=True)],
        "table": labelled_table(scores) if label_of else None,
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


class Gallery:
    """The photographs of a database. parts: lists of images, and the names of the descriptors in their order."""

    def __init__(self, parts: Sequence[tuple[ImageList, Sequence[str]]]) -> None:
        self._names = [name for _, names in parts for name in names]
        self._parts = [
            (len(names), images, {name: index for index, name in enumerate(images.names)}) for images, names in parts
        ]

    def name(self, index: int) -> str:
        return self._names[index]

    def photo(self, index: int) -> tuple[ImageList, int] | None:
        """The list an image is in, and its index there; None if it is in none."""
        name = self._names[index]
        for count, images, index_of in self._parts:
            if index < count:
                return (images, index_of[name]) if name in index_of else None
            index -= count
        raise AssertionError(index)


def spread(count: int, most: int) -> list[int]:
    """Indices below `count`, evenly spread, `most` of them at most; 0: all."""
    if not most or most >= count:
        return list(range(count))
    return [place * count // most for place in range(most)]


def revisited_table(scores: Sequence[dict]) -> dict:
    """`columns`, and `rows` with the name of a setting, `values` (run -> column), what was published (mAP, or None),
    how many queries count, and with two runs how far they differ."""
    differences = comparison.compare(*scores) if len(scores) == 2 else {}
    of_paper = dict(zip("MH", published(scores[0]["card"]) or (), strict=False))
    rows = []
    for setting, name in SETTING_NAMES.items():
        counted = sum(ap is not None for ap in scores[0][setting]["aps"])
        rows.append(
            {
                "name": name,
                "values": [[score[setting]["mAP"], *score[setting]["mP@k"]] for score in scores],
                "published": of_paper.get(setting),
                "counted": counted,
                "difference": differences.get(setting, {}).get("difference"),
            }
        )
    return {"columns": ["mAP", *(f"mP@{kappa}" for kappa in scores[0]["kappas"])], "rows": rows}


def labelled_table(scores: Sequence[dict]) -> dict:
    columns = [*(f"recall@{kappa}" for kappa in KAPPAS), "mAP", "mAP@R"]
    values = [[score[column] for column in columns] for score in scores]
    row = {"name": "Same label", "values": values, "counted": scores[0]["queries"]}
    return {"columns": columns, "rows": [row]}


def pictures(
    cfg: CfgNode,
    queries: Sequence[tuple[str, tuple[ImageList, int] | None]],
    lists: Sequence[Sequence[RankedList]],
    gallery: Gallery,
    provenances: Sequence[dict],
    shown: Shown,
) -> dict:
    """`queries` (name and photograph each), `images` and `notes` of a page. lists: of each run, for each query."""
    notes: list[str] = []
    missed = [[one.missed[: shown.missed] for one in of_run] for of_run in lists]
    of_rows = [*(one.found for of_run in lists for one in of_run), *(rows for of_run in missed for rows in of_run)]
    needed = sorted({image for rows in of_rows for image, *_ in rows})
    number = {image: place for place, image in enumerate(needed)}
    photos = _jpegs(cfg, [gallery.photo(image) for image in needed], RESULT, "results", notes)
    own = _jpegs(cfg, [photo for _, photo in queries], QUERY, "queries", notes)
    heats = _heats(cfg, [photo for _, photo in queries], provenances, notes) if shown.attention else []
    return {
        "images": [[gallery.name(image), photo] for image, photo in zip(needed, photos, strict=True)],
        "queries": [
            {
                "name": name,
                "photo": own[place],
                "heat": [of_run[place] for of_run in heats],
                "runs": [
                    {
                        "found": [
                            [number[image], round(score, 4), label] for image, score, label in of_run[place].found
                        ],
                        "missed": [[number[image], rank, label] for image, rank, label in rows[place]],
                        "later": len(of_run[place].missed),
                        "ranks": of_run[place].ranks,
                        "aps": of_run[place].aps,
                    }
                    for of_run, rows in zip(lists, missed, strict=True)
                ],
            }
            for place, (name, _) in enumerate(queries)
        ],
        "notes": notes,
    }


def _curves(lists: Sequence[Sequence[RankedList]], settings: Sequence[dict]) -> list[dict]:
    return [{setting["key"]: mean_curve(of_run, setting["key"]) for setting in settings} for of_run in lists]


def _jpegs(
    cfg: CfgNode, photos: Sequence[tuple[ImageList, int] | None], size: tuple[int, int], what: str, notes: list[str]
) -> list[str | None]:
    """base64 of each photograph; None where there is none, and then a note."""
    there = [photo for photo in photos if photo is not None]
    made = iter(thumbnails(there, size=size, max_pixels=cfg.INFER.MAX_PIXELS, title=f"pictures of {what}"))
    found = [None if photo is None else next(made) for photo in photos]
    errors = [str(one) for one in found if isinstance(one, ImageError)]
    absent = sum(one is None for one in found)
    if errors:
        notes.append(f"{len(errors)} of {len(found)} {what} have no picture here: {errors[0]}")
    if absent:
        notes.append(f"{absent} of {len(found)} {what} are no longer in the list of images")
    return [base64.b64encode(one).decode() if isinstance(one, bytes) else None for one in found]


def _heats(
    cfg: CfgNode, photos: Sequence[tuple[ImageList, int] | None], provenances: Sequence[dict], notes: list[str]
) -> list[list[str | None]]:
    """Of each run, base64 of the attention over each query; all None, and a note, where there is no network for it."""
    device = "cuda" if cfg.NUM_GPUS and torch.cuda.is_available() else "cpu"
    made: dict[str, list[str | None]] = {}
    for provenance in provenances:
        key = str(provenance.get("weights_sha256"))
        if key not in made:
            made[key] = [None] * len(photos)
            try:
                network = load_network(provenance, weights=cfg.TEST.WEIGHTS, device=device)
            except ValueError as error:
                notes.append(f"no attention maps: {error}")
                continue
            for place, photo in enumerate(bar(photos, "attention", unit="query", delay=1)):
                with contextlib.suppress(ImageError):  # which is told of already
                    if photo is not None:
                        attention = attention_of(network, *photo, max_pixels=cfg.INFER.MAX_PIXELS)
                        made[key][place] = base64.b64encode(heat(attention)).decode()
    return [made[str(provenance.get("weights_sha256"))] for provenance in provenances]
