"""The toy landmarks: a training set and a retrieval set of procedural buildings, made from a seed.

`generate` writes one folder, `<root>/toy`:

- `images/<landmark>/<view>.jpg` with `train_list.txt` and `val_list.txt` (lines `path label`), the training set;
- `jpg/<name>.jpg` with `gnd_toy.pkl`, a retrieval set in the Revisited format (Radenovic et al., CVPR 2018), of other
  buildings than the training set: queries with boxes, and a database with distractors that show none of them;
- `toy.json`, written last: parameters, counts, and for every picture its size, digest and what it shows.

A picture is a function of (seed, role, landmark, view) alone: with the same versions of NumPy and OpenCV, of the same
bytes.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from datasets.errors import DataError
from datasets.images.decode import decode
from datasets.toy.buildings import Card, build
from datasets.toy.camera import Photo, take
from datasets.toy.groundtruth import ground_truth
from datasets.toy.plans import draw_plan
from datasets.toy.views import View, draw_view

VERSION = 1  # raise it when the same parameters give other pictures
TRAIN, RETRIEVAL, DISTRACTOR, HOUSE = range(4)  # what a building is for
ROLES = ("train", "val", "query", "database", "distractor")
LEVELS = {"train": 0.6, "val": 0.6, "query": 0.4, "database": 0.9, "distractor": 0.6}  # how cruel views get, of 1
HOUSES = 12  # ordinary houses to put beside the landmarks

Task = tuple[int, int, int, list[tuple[str, int, int]]]  # seed, purpose, landmark, pictures (path, role, view)


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def _spread(index: int) -> float:
    """The van der Corput sequence 0, 1/2, 1/4, 3/4, ...: any number of views covers kind to cruel evenly."""
    value, part = 0.0, 0.5
    while index:
        value, index, part = value + part * (index & 1), index >> 1, part / 2
    return value


@lru_cache(maxsize=4)
def _building(seed: int, purpose: int, landmark: int) -> list[Card]:
    rng = np.random.default_rng([seed, purpose, landmark])
    plain = purpose == HOUSE or (purpose == DISTRACTOR and landmark % 3 == 2)
    return build(draw_plan(rng, plain=plain), rng)


@lru_cache(maxsize=1)
def _houses(seed: int) -> list[list[Card]]:
    return [_building(seed, HOUSE, k) for k in range(HOUSES)]


def _photograph(seed: int, purpose: int, landmark: int, role: str, view: int) -> tuple[Photo, View]:
    """Take one picture; where too little of the landmark is seen for its role, another under kinder conditions."""
    rng = np.random.default_rng([seed, len(ROLES) + ROLES.index(role), landmark, view])
    level = _spread(landmark if role == "distractor" else view) * LEVELS[role]
    least = {"query": 0.55, "train": 0.25, "val": 0.25}.get(role, 0.0)
    if role == "database" and view == 0:
        least = 0.5  # so that every query has an image to find
    cards = _building(seed, purpose, landmark)
    corners = np.concatenate([card.corners for card in cards])
    aspect = float(np.ptp(corners[:, 0]) / np.ptp(corners[:, 1]))
    for attempt in count():
        conditions = draw_view(rng, level * 0.8**attempt, aspect)
        others = [_houses(seed)[int(rng.integers(HOUSES))] for _ in range(conditions.neighbours)]
        photo = take(rng, cards, conditions, others)
        if photo.visible >= least and (least == 0 or photo.area >= 0.04):
            return photo, conditions
    raise AssertionError("unreachable")


def _render(folder: Path, task: Task) -> dict[str, dict]:
    """Write the pictures of one building; gives a record for each path."""
    seed, purpose, landmark, pictures = task
    records = {}
    for path, role, view in pictures:
        photo, conditions = _photograph(seed, purpose, landmark, ROLES[role], view)
        done, data = cv2.imencode(".jpg", photo.image, [cv2.IMWRITE_JPEG_QUALITY, conditions.quality])
        assert done, path
        content = data.tobytes()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / path, content)
        records[path] = {
            "role": ROLES[role],
            "landmark": landmark,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "visible": round(photo.visible, 4),
            "area": round(photo.area, 4),
            "severity": round(conditions.severity, 4),
            "yaw": round(conditions.yaw, 2),
            "box": None if photo.box is None else list(photo.box),
        }
    return records


def _tasks(p: dict[str, int]) -> Iterator[Task]:
    seed = p["seed"]
    for k in range(p["train_landmarks"]):
        pictures = [(f"images/{k:04d}/{v:03d}.jpg", ROLES.index("train"), v) for v in range(p["views"])]
        pictures += [(f"images/{k:04d}/val_{v:03d}.jpg", ROLES.index("val"), v) for v in range(p["val_views"])]
        yield seed, TRAIN, k, pictures
    for k in range(p["retrieval_landmarks"]):
        pictures = [(f"jpg/query_{k:03d}_{v}.jpg", ROLES.index("query"), v) for v in range(p["queries"])]
        pictures += [
            (f"jpg/landmark_{k:03d}_{v:02d}.jpg", ROLES.index("database"), v) for v in range(p["database_views"])
        ]
        yield seed, RETRIEVAL, k, pictures
    for k in range(p["distractors"]):
        yield seed, DISTRACTOR, k, [(f"jpg/other_{k:04d}.jpg", ROLES.index("distractor"), 0)]


def _tables(p: dict[str, int], records: dict[str, dict]) -> dict[str, bytes]:
    """The list files and the ground truth, by name."""
    tables = {}
    for role in ("train", "val"):
        lines = [f"{path} {r['landmark']}\n" for path, r in sorted(records.items()) if r["role"] == role]
        tables[f"{role}_list.txt"] = "".join(lines).encode()
    tables["gnd_toy.pkl"] = pickle.dumps(ground_truth(p["seed"], records), protocol=2)
    return tables


def _known(folder: Path, parameters: dict[str, int]) -> dict[str, dict]:
    """Records of the pictures already there and whole. Empties a folder made with other parameters, or half made."""
    manifest, begun = folder / "toy.json", folder / "toy.unfinished"
    if folder.is_dir() and any(folder.iterdir()) and not manifest.exists() and not begun.exists():
        raise DataError(f"{folder} holds files that are not the toy set; name another folder, or empty this one")
    try:
        recorded = json.loads(manifest.read_bytes())
        if recorded["version"] == VERSION and recorded["parameters"] == parameters:
            records = recorded["images"]
            return {
                path: r
                for path, r in records.items()
                if (folder / path).is_file() and (folder / path).stat().st_size == r["size"]
            }
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # no usable manifest: make everything
    folder.mkdir(parents=True, exist_ok=True)
    _write(begun, b"the toy set is being made here; run the generator again to finish it\n")
    manifest.unlink(missing_ok=True)
    for part in ("images", "jpg"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return {}


def generate(
    root: Path,
    *,
    seed: int = 0,
    train_landmarks: int = 56,
    views: int = 18,
    val_views: int = 3,
    retrieval_landmarks: int = 20,
    queries: int = 2,
    database_views: int = 10,
    distractors: int = 100,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Make the toy set in `<root>/toy` and return that folder.

    `views`, `val_views`, `queries` and `database_views` are numbers of pictures a landmark. What a former run with the
    same parameters left is kept; a picture that is absent or has not its recorded size is made again. More than one
    worker means spawned processes. Raises DataError for a useless number, and for a folder that holds something else.
    """
    parameters = {
        "seed": seed,
        "train_landmarks": train_landmarks,
        "views": views,
        "val_views": val_views,
        "retrieval_landmarks": retrieval_landmarks,
        "queries": queries,
        "database_views": database_views,
        "distractors": distractors,
    }
    for name, value in parameters.items():
        least = 0 if name in ("seed", "distractors") else 1
        if value < least:
            raise DataError(f"toy set: {name} is {value}, must be at least {least}")
    folder = Path(root) / "toy"
    records = _known(folder, parameters)
    missing = []
    for *building, pictures in _tasks(parameters):
        if absent := [picture for picture in pictures if picture[0] not in records]:
            missing.append((*building, absent))
    job = partial(_render, folder)
    bar = partial(tqdm, total=len(missing), desc="toy landmarks", unit="building", disable=not progress or not missing)
    if workers > 1 and len(missing) > workers:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            for made in bar(pool.map(job, missing, chunksize=4)):
                records.update(made)
    else:
        for made in bar(map(job, missing)):
            records.update(made)

    tables = _tables(parameters, records)
    for name, data in tables.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != data:
            _write(folder / name, data)
    digest = hashlib.sha256("".join(f"{path} {records[path]['sha256']}\n" for path in sorted(records)).encode())
    counts = {role: sum(r["role"] == role for r in records.values()) for role in ROLES}
    manifest = {
        "version": VERSION,
        "parameters": parameters,
        "counts": counts,
        "sha256": digest.hexdigest(),
        "files": {name: len(data) for name, data in tables.items()},
        "images": {path: records[path] for path in sorted(records)},
    }
    text = json.dumps(manifest, indent=0).encode()
    if not (folder / "toy.json").is_file() or (folder / "toy.json").read_bytes() != text:
        _write(folder / "toy.json", text)
    (folder / "toy.unfinished").unlink(missing_ok=True)
    return folder


def contact_sheet(root: Path, path: Path, *, rows: int = 12, columns: int = 10) -> None:
    """Write a picture of pictures: a landmark a row, the upper half for training, the lower half for retrieval."""
    folder = Path(root) / "toy"
    images = json.loads((folder / "toy.json").read_bytes())["images"]
    sheet = np.full((rows * 172, columns * 172, 3), 255, np.uint8)
    chosen = [("train", k) for k in range(rows // 2)] + [("database", k) for k in range(rows - rows // 2)]
    for row, wanted in enumerate(chosen):
        names = [n for n, r in images.items() if (r["role"], r["landmark"]) == wanted][:columns]
        for column, name in enumerate(names):
            image = decode(folder / name)
            sheet[row * 172 : row * 172 + image.shape[0], column * 172 : column * 172 + image.shape[1]] = image
    done, data = cv2.imencode(".png", sheet)
    assert done, path
    _write(Path(path), data.tobytes())
