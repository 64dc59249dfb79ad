"""The pictures on a page: results, queries, and attention over these, as text that HTML can hold."""

import base64
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from core.base.progress import bar
from datasets.images.decode import ImageError
from evaler.features.provenance import Provenance
from evaler.pages.attention_maps import attention_of, load_network
from evaler.pages.thumbnails import heat, thumbnails
from evaler.scoring.ranked_lists import RankedList
from evaler.sources.image_list import ImageList

RESULT, QUERY = (256, 192), (480, 360)  # largest width and height of their pictures


@dataclass(frozen=True)
class Shown:
    """How much a page shows. queries: at most, 0 for all; missed: right images that come later, at most."""

    top: int = 20
    queries: int = 0
    missed: int = 10
    attention: bool = True


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


def pictures(
    cfg: CfgNode,
    queries: Sequence[tuple[str, tuple[ImageList, int] | None]],
    lists: Sequence[Sequence[RankedList]],
    gallery: Gallery,
    provenances: Sequence[Provenance],
    shown: Shown,
) -> dict:
    """`queries` (name and photograph each), `images` and `notes` of a page. lists: of each run, for each query."""
    notes: list[str] = []
    missed = [[one.missed[: shown.missed] for one in of_run] for of_run in lists]
    of_rows: list[Sequence[tuple[int, float, str]]] = [one.found for of_run in lists for one in of_run]
    of_rows += [rows for of_run in missed for rows in of_run]
    needed = sorted({image for rows in of_rows for image, *_ in rows})
    number = {image: place for place, image in enumerate(needed)}
    photos = _jpegs(cfg, [gallery.photo(image) for image in needed], RESULT, "results", notes)
    query_jpegs = _jpegs(cfg, [photo for _, photo in queries], QUERY, "queries", notes)
    heats = _heats(cfg, [photo for _, photo in queries], provenances, notes) if shown.attention else []
    return {
        "images": [[gallery.name(image), photo] for image, photo in zip(needed, photos, strict=True)],
        "queries": [
            {
                "name": name,
                "photo": query_jpegs[place],
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


def _jpegs(
    cfg: CfgNode, photos: Sequence[tuple[ImageList, int] | None], size: tuple[int, int], what: str, notes: list[str]
) -> list[str | None]:
    """base64 of each photograph; None where there is none, and then a note."""
    there = [photo for photo in photos if photo is not None]
    made = iter(thumbnails(there, size=size, max_pixels=cfg.INFER.MAX_PIXELS, title=f"pictures of {what}"))
    jpegs = [None if photo is None else next(made) for photo in photos]
    errors = [str(one) for one in jpegs if isinstance(one, ImageError)]
    absent = sum(one is None for one in jpegs)
    if errors:
        notes.append(f"{len(errors)} of {len(jpegs)} {what} have no picture here: {errors[0]}")
    if absent:
        notes.append(f"{absent} of {len(jpegs)} {what} have no picture: they came by index.py --add, or are gone since")
    return [base64.b64encode(one).decode() if isinstance(one, bytes) else None for one in jpegs]


def _heats(
    cfg: CfgNode, photos: Sequence[tuple[ImageList, int] | None], provenances: Sequence[Provenance], notes: list[str]
) -> list[list[str | None]]:
    """Of each run, base64 of the attention over each query; all None, and a note, where there is no network for it."""
    device = "cuda" if cfg.NUM_GPUS and torch.cuda.is_available() else "cpu"
    made: dict[str | None, list[str | None]] = {}
    for provenance in provenances:
        key = provenance.weights_sha256
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
    return [made[provenance.weights_sha256] for provenance in provenances]
