"""The toy landmarks: the same bytes from the same seed, well-formed lists and ground truth, repair of what is lost."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.images.decode import ImageError
from datasets.toy import groundtruth as toy_groundtruth
from datasets.toy import landmarks as toy
from datasets.toy.plans import draw_plan

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "train_landmarks": 2,
    "views": 3,
    "val_views": 1,
    "retrieval_landmarks": 3,
    "queries": 2,
    "database_views": 6,
    "distractors": 4,
}
KINDS = ("easy", "hard", "junk")


def make(root: Path, **changes) -> Path:
    return toy.generate(root, **{**SMALL, "workers": 1, "progress": False, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


class NoGlobals(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def ground_truth(folder: Path) -> dict:
    return NoGlobals(io.BytesIO((folder / "gnd_toy.pkl").read_bytes())).load()


def images(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "toy.json").read_text())["images"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nobody changes this one."""
    return make(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The same files, to be damaged."""
    for name, data in contents(folder).items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_bytes(data)
    return tmp_path / "toy"


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again = make(tmp_path)
    assert contents(again) == contents(folder)
    assert not (again / "toy.unfinished").exists()


def test_a_picture_does_not_depend_on_how_many_there_are(folder, tmp_path):
    fewer = make(
        tmp_path, train_landmarks=1, views=2, retrieval_landmarks=1, queries=1, database_views=2, distractors=1
    )
    pictures = {name: data for name, data in contents(fewer).items() if name.endswith(".jpg")}
    assert len(pictures) == 1 * (2 + 1) + 1 + 2 + 1
    assert pictures.items() <= contents(folder).items()


def test_another_seed_gives_other_pictures_and_replaces_the_old(folder, copy):
    make(copy.parent, seed=1)
    old, new = contents(folder), contents(copy)
    pictures = [name for name in old if name.endswith(".jpg")]
    assert all(old[name] != new[name] for name in pictures)
    first, second = images(folder), images(copy)
    same = [path for path in first if first[path]["yaw"] == second[path]["yaw"]]
    assert len(same) < 3  # not only other buildings, but other views (a yaw has two decimals)
    make(copy.parent, seed=1, train_landmarks=1, retrieval_landmarks=1, distractors=0)
    assert len(list(copy.rglob("*.jpg"))) == 4 + 8  # nothing of the larger set is left behind


def test_plans_of_all_landmarks_differ():
    plans = {
        (purpose, k): draw_plan(np.random.default_rng([0, purpose, k]))
        for purpose in (toy.TRAIN, toy.RETRIEVAL, toy.DISTRACTOR)
        for k in range(60)
    }
    shapes = {}
    for key, plan in plans.items():  # whatever the colours
        shape = (plan.bays, plan.masonry, plan.roof, plan.door, plan.ornament, tuple(s.window for s in plan.storeys))
        shape += (tuple((t.cap, round(t.x, 1)) for t in plan.towers), plan.dome and plan.dome[0], plan.portico)
        assert shape not in shapes, (key, shapes[shape])
        shapes[shape] = key


def test_training_retrieval_and_distractors_show_different_buildings():
    shown: dict[str, set[tuple[int, int]]] = {role: set() for role in toy.ROLES}
    for _, purpose, landmark, pictures in toy._tasks({**SMALL, "seed": 0}):
        for _, role, _ in pictures:
            shown[toy.ROLES[role]].add((purpose, landmark))
    assert shown["train"] == shown["val"] and shown["query"] == shown["database"]
    assert not shown["train"] & shown["query"]
    assert not shown["distractor"] & (shown["train"] | shown["query"])
    walls = [{card.texture.tobytes() for card in toy._building(0, *key)} for role in shown for key in shown[role]]
    assert len(set.union(*map(set, walls))) == sum(map(len, {frozenset(w) for w in walls}))  # no two share one


@pytest.mark.parametrize(("name", "role", "views"), [("train_list.txt", "train", 3), ("val_list.txt", "val", 1)])
def test_lists(folder, name, role, views):
    rows = [line.split(" ") for line in (folder / name).read_text().splitlines()]
    assert Counter(int(label) for _, label in rows) == {0: views, 1: views}
    assert {path for path, _ in rows} == {path for path, r in images(folder).items() if r["role"] == role}
    for path, label in rows:
        assert images(folder)[path]["landmark"] == int(label) == int(Path(path).parent.name)
        image = cv2.imread(str(folder / path))
        assert image is not None and 100 <= min(image.shape[:2]) <= max(image.shape[:2]) <= 180


def test_the_lists_share_no_picture(folder):
    train, val = ((folder / f"{n}_list.txt").read_text().split()[::2] for n in ("train", "val"))
    assert not {(folder / p).read_bytes() for p in train} & {(folder / p).read_bytes() for p in val}


def plain(value) -> bool:
    if type(value) is dict:
        return all(type(k) is str and plain(v) for k, v in value.items())
    return all(map(plain, value)) if type(value) is list else type(value) in (int, float, str)


def test_ground_truth(folder):
    found = ground_truth(folder)
    assert plain(found) and set(found) == {"imlist", "qimlist", "gnd"}
    names, queries = found["imlist"], found["qimlist"]
    assert len(names) == len(set(names)) == 3 * 6 + 4 and len(queries) == len(set(queries)) == 6
    assert not set(names) & set(queries)
    assert names != sorted(names)
    assert {p.stem for p in (folder / "jpg").iterdir()} == {*names, *queries}
    records = {Path(path).stem: r for path, r in images(folder).items() if path.startswith("jpg/")}
    for query, entry in zip(queries, found["gnd"], strict=True):
        height, width = cv2.imread(str(folder / "jpg" / f"{query}.jpg")).shape[:2]
        x1, y1, x2, y2 = entry["bbx"]
        assert all(type(v) is float for v in entry["bbx"])
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and (x2 - x1) * (y2 - y1) > 0.05 * width * height
        assert entry["easy"] or entry["hard"]
        listed = [i for kind in KINDS for i in entry[kind]]
        assert len(set(listed)) == len(listed)
        same = {
            i
            for i, n in enumerate(names)
            if records[n]["role"] == "database" and records[n]["landmark"] == records[query]["landmark"]
        }
        assert set(listed) == same and len(same) == 6  # and so a distractor is never a positive, nor junk


def test_easy_is_better_visible_than_hard_and_hard_than_junk(tmp_path):
    few = {"train_landmarks": 1, "views": 1, "retrieval_landmarks": 9, "queries": 1, "database_views": 8}
    folder = make(tmp_path, **few, distractors=0)
    found, records = ground_truth(folder), images(folder)
    visible = {
        kind: [records[f"jpg/{found['imlist'][i]}.jpg"]["visible"] for e in found["gnd"] for i in e[kind]]
        for kind in KINDS
    }
    assert all(visible.values())
    assert np.mean(visible["easy"]) > np.mean(visible["hard"]) + 0.05
    assert np.mean(visible["hard"]) > np.mean(visible["junk"]) + 0.2
    assert min(visible["easy"]) >= toy_groundtruth.EASY_VISIBLE > toy_groundtruth.JUNK_VISIBLE > min(visible["junk"])
    assert min(visible["hard"]) >= toy_groundtruth.JUNK_VISIBLE


def test_grades():
    query = {"yaw": 0.0}
    image = {"visible": 1.0, "area": 0.5, "severity": 0.0, "yaw": 0.0}
    assert toy_groundtruth.grade(query, image) == "easy"
    assert toy_groundtruth.grade(query, image | {"visible": toy_groundtruth.EASY_VISIBLE - 0.01}) == "hard"
    assert toy_groundtruth.grade(query, image | {"severity": 1.0}) == "hard"
    assert toy_groundtruth.grade(query, image | {"severity": 0.9 * toy_groundtruth.EASY_CHANGE, "yaw": 40.0}) == "hard"
    assert (
        toy_groundtruth.grade({"yaw": 40.0}, image | {"severity": 0.9 * toy_groundtruth.EASY_CHANGE, "yaw": 40.0})
        == "easy"
    )
    assert toy_groundtruth.grade(query, image | {"visible": toy_groundtruth.JUNK_VISIBLE - 0.01}) == "junk"
    assert toy_groundtruth.grade(query, image | {"area": toy_groundtruth.JUNK_AREA / 2}) == "junk"


def test_a_second_run_writes_nothing(copy):
    before = times(copy)
    make(copy.parent)
    assert times(copy) == before


def test_lost_and_damaged_files_are_made_again(folder, copy):
    lost = ["images/0001/002.jpg", "jpg/query_000_1.jpg", "gnd_toy.pkl", "train_list.txt"]
    for name in lost:
        (copy / name).unlink()
    cut = copy / "jpg" / "other_0003.jpg"
    os.truncate(cut, 1000)
    (copy / "val_list.txt").write_bytes(b"images/0000/val_000.jpg 0\n")
    before = times(copy)
    make(copy.parent)
    assert contents(copy) == contents(folder)
    changed = {name for name, when in times(copy).items() if before.get(name) != when}
    assert changed == {*lost, "jpg/other_0003.jpg", "val_list.txt"}


@pytest.mark.parametrize("fault", ["killed", "unreadable manifest", "older version"])
def test_an_unfinished_set_is_made_anew(folder, copy, fault):
    if fault == "killed":
        (copy / "toy.json").unlink()
        (copy / "toy.unfinished").touch()
    elif fault == "unreadable manifest":
        os.truncate(copy / "toy.json", 100)
    else:
        manifest = json.loads((copy / "toy.json").read_text())
        (copy / "toy.json").write_text(json.dumps(manifest | {"version": toy.VERSION - 1}))
    stale = copy / "images" / "0000" / "000.jpg"
    stale.write_bytes(bytes(stale.stat().st_size))
    make(copy.parent)
    assert contents(copy) == contents(folder)


def test_a_contact_sheet_names_an_image_that_is_lost(copy, tmp_path):
    name = next(iter(images(copy)))
    (copy / name).unlink()
    with pytest.raises(ImageError, match=name):
        toy.contact_sheet(tmp_path, tmp_path / "sheet.png")


def test_files_of_somebody_else_are_not_touched(tmp_path):
    (tmp_path / "toy" / "jpg").mkdir(parents=True)
    (tmp_path / "toy" / "jpg" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds files that are not the toy set"):
        make(tmp_path)
    assert contents(tmp_path) == {"toy/jpg/mine.jpg": b"mine"}


@pytest.mark.parametrize("name", ["train_landmarks", "views", "queries", "seed", "distractors"])
def test_useless_numbers_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        make(tmp_path, **{name: -1})
    assert not list(tmp_path.iterdir())


def test_command(folder, tmp_path):
    """From another folder and with spawned processes, as the demo runs it."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = [sys.executable, str(ROOT / "scripts" / "make_toy.py"), "--out", "data", *options]
    done = subprocess.run(
        [*command, "--contact-sheet", "sheet.png"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(Path("data", "toy")) and "toy landmarks: 100%" in done.stderr
    assert contents(tmp_path / "data" / "toy") == contents(folder)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None and np.mean(sheet < 255) > 0.1
    done = subprocess.run([*command, "--views", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: toy set: views is 0, must be at least 1\n")
