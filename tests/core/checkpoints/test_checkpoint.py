"""Checkpoint files: whole or absent, verified, the newest of them, and what is kept."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core.builders import build_classifier, build_descriptor, load_initial_weights, load_tested_weights
from core.checkpoints import checkpoint
from core.checkpoints.checkpoint import (
    BEST,
    checkpoint_path,
    checkpoints,
    find_fault,
    link_best,
    newest_checkpoint,
    prune,
    remove_unfinished,
    write_checkpoint,
)
from core.checkpoints.saved_settings import changed_settings, check_saved_settings
from core.config import get_cfg, load_cfg
from model.weights.loading import WeightsError, better_state, read_checkpoint
from tests.small_run import ROOT, child_environment

STATES = {"model_state": 1.0, "ema_state": 2.0}
CONTENT = {"epoch": 0, "model_state": {"weight": torch.arange(600.0).reshape(20, 30)}, "cfg": "A: 1\n"}


def written(out_dir: Path, *places: tuple[int, int]) -> list[Path]:
    paths = [checkpoint_path(out_dir, *place) for place in places]
    for path in paths:
        write_checkpoint(CONTENT, path)
    return paths


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((0, 0), "model_epoch_0000.pyth"),
        ((12345, 0), "model_epoch_12345.pyth"),
        ((3, 20), "model_epoch_0003_iter_000020.pyth"),
        ((3, 1234567), "model_epoch_0003_iter_1234567.pyth"),
    ],
)
def test_names(place, name):
    assert checkpoint_path("out", *place) == Path("out/checkpoints") / name


def test_a_file_can_be_read_without_executing_anything_and_nothing_lies_beside_it(tmp_path):
    (path,) = written(tmp_path, (1, 0))
    assert os.listdir(path.parent) == [path.name]
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["model_state"]["weight"], CONTENT["model_state"]["weight"])


def test_the_newest_is_the_one_that_has_come_farthest(tmp_path):
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) == (None, [])
    folder.mkdir()
    assert newest_checkpoint(tmp_path) == (None, [])
    paths = written(tmp_path, (3, 0), (9999, 0), (9999, 5), (10000, 0), (9999, 12))
    for name in (
        ".model_epoch_20000.pyth.abc.tmp",
        "model_epoch_20001.pyth.tmp",
        "model_epoch_20002.pyth~",
        "old_model_epoch_20003.pyth",
        "model_epoch_77.pyth",
        "model_epoch_.pyth",
        "model_epoch_20004_iter_5.pyth",
        BEST,
    ):
        (folder / name).touch()
    assert checkpoints(tmp_path) == [paths[i] for i in (0, 1, 2, 4, 3)]
    assert newest_checkpoint(tmp_path) == (paths[3], [])


def test_a_broken_newest_is_named_and_the_one_before_it_taken(tmp_path):
    paths = written(tmp_path, (1, 0), (2, 0), (2, 7))
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 2] ^= 1
    paths[1].write_bytes(data)
    newest, notes = newest_checkpoint(tmp_path)
    assert newest == paths[0]
    reasons = "File is not a zip file", r"Bad CRC-32 for .*data/\d+'"
    for path, note, reason in zip(paths[:0:-1], notes, reasons, strict=True):
        why = rf"not a readable weight file: its archive is damaged or cut short \({reason}\)"
        assert re.fullmatch(rf"{path} is broken \({why}\): the one before it is used", note)


def test_if_all_are_broken_nothing_is_begun_anew(tmp_path):
    for path in written(tmp_path, (1, 0), (2, 0)):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints is whole: remove them to start anew"):
        newest_checkpoint(tmp_path)


def test_no_flipped_bit_changes_what_is_read_unnoticed(tmp_path):
    (path,) = written(tmp_path, (1, 0))
    data, chance = path.read_bytes(), random.Random(0)
    assert find_fault(path) is None
    noticed = 0
    for _ in range(300):
        position, bit = chance.randrange(len(data)), chance.randrange(8)
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
        if find_fault(path):
            noticed += 1
            continue
        content = read_checkpoint(path)  # the bit lies in the padding, in a date or a count
        assert content["epoch"] == 0 and content["cfg"] == "A: 1\n"
        assert torch.equal(content["model_state"]["weight"], CONTENT["model_state"]["weight"])
    assert noticed > 150


@pytest.mark.parametrize("length", [0, 1, 100, 2000, -22, -1])
def test_no_file_cut_short_is_taken(tmp_path, length):
    (path,) = written(tmp_path, (1, 0))
    path.write_bytes(path.read_bytes()[:length])
    assert find_fault(path)


PLACES = [(1, 0), (1, 5), (2, 0), (2, 5), (2, 10), (2, 15), (3, 0)]


@pytest.mark.parametrize(
    ("keep", "count", "kept"),
    [
        (1, 7, [(3, 0)]),
        (3, 7, [(2, 10), (2, 15), (3, 0)]),
        (99, 7, PLACES),
        (0, 7, [(1, 0), (2, 0), (2, 15), (3, 0)]),  # all that end an epoch, and the newest two
        (0, 6, [(1, 0), (2, 0), (2, 10), (2, 15)]),
        (0, 2, [(1, 0), (1, 5)]),
    ],
)
def test_what_is_kept(tmp_path, keep, count, kept):
    written(tmp_path, *PLACES[:count])
    prune(tmp_path, keep)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, *place) for place in kept]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_outlives_its_first_name(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(checkpoint.os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError("no links")))
    for place in ((1, 0), (2, 0)):
        (path,) = written(tmp_path, place)
        write_checkpoint({**CONTENT, "epoch": place[0]}, path)
        link_best(path)
    path.unlink()
    best = path.with_name(BEST)
    assert find_fault(best) is None and torch.load(best, weights_only=True)["epoch"] == 2
    assert sorted(os.listdir(path.parent)) == [BEST, "model_epoch_0001.pyth"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (path,) = written(tmp_path, (1, 0))
    left = [path.with_name(".model_epoch_0002.pyth.x8_3.tmp"), path.with_name(f".{BEST}.tmp")]
    others = [path, path.with_name("notes.tmp")]
    for file in (*left, others[1]):
        file.touch()
    remove_unfinished(tmp_path)
    assert sorted(path.parent.iterdir()) == sorted(others)


def test_a_disk_that_is_full_is_named_and_leaves_what_was_there(tmp_path):
    """The limit of a process on the size of its files fails in the same place."""
    (path,) = written(tmp_path, (1, 0))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    content = {**CONTENT, "model_state": {"weight": torch.zeros(300, 300)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_checkpoint(content, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# ------------------------------------------------------------------------------------ killed in the middle of a save

SAVE = """
import os, signal, sys, torch
from core.base import files
from core.checkpoints.checkpoint import checkpoint_path, write_checkpoint

out_dir, first, last, kill_at = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(first)
content = {"epoch": 0, "model_state": {f"w{i}": torch.full((50, 50), float(first)) for i in range(16)}}
points = 0

def passing(function):  # count the system calls of a save, and die before one of them
    def call(*args, **kwargs):
        global points
        points += 1
        if points == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

real_fdopen = os.fdopen
def fdopen(*args, **kwargs):
    file = real_fdopen(*args, **kwargs)
    class Counted:
        write, flush = staticmethod(passing(file.write)), staticmethod(passing(file.flush))
        fileno = staticmethod(file.fileno)
        def __getattr__(self, name): return getattr(file, name)
        def __enter__(self): return self
        def __exit__(self, *error): file.close()
    return Counted()

files.os.fdopen = fdopen
for name in ("fsync", "chmod", "replace"):
    setattr(files.os, name, passing(getattr(os, name)))
for number in range(first, last + 1):
    for value in content["model_state"].values():
        value.fill_(number)
    write_checkpoint({**content, "epoch": number}, checkpoint_path(out_dir, number))
print(points)
"""


def saving(out_dir: Path, first: int, last: int, kill_at: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SAVE, *map(str, (out_dir, first, last, kill_at))]
    return subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=60)


def is_whole(path: Path, number: int) -> bool:
    content = read_checkpoint(path)
    return content["epoch"] == number and all(value.eq(number).all() for value in content["model_state"].values())


def assert_nothing_lost(out_dir: Path) -> None:
    """Checkpoint 1 was finished; 2 may or may not have been."""
    newest, notes = newest_checkpoint(out_dir)
    assert notes == [] and newest in (checkpoint_path(out_dir, 1), checkpoint_path(out_dir, 2))
    assert is_whole(newest, int(newest.stem[-4:])) and is_whole(checkpoint_path(out_dir, 1), 1)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """How many calls one save makes."""
    return int(saving(tmp_path_factory.mktemp("count"), 1, 1, 0).stdout)


@pytest.mark.parametrize("part", [0.0, 0.4, 0.9, 1.0])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path, points, part):
    ended = saving(tmp_path, 1, 2, points + 1 + int(part * (points - 1)))
    assert ended.returncode == -signal.SIGKILL, ended
    assert_nothing_lost(tmp_path)


@pytest.mark.soak
def test_killed_at_every_call_of_a_save(tmp_path, points):
    """100 and more different points: every write, flush, fsync, chmod and rename of a save."""
    assert points >= 100
    lost = 0
    for point in range(points):
        out_dir = tmp_path / str(point)
        assert saving(out_dir, 1, 2, points + 1 + point).returncode == -signal.SIGKILL
        assert_nothing_lost(out_dir)
    print(f"\nkilled at {points} points of a save: {lost} checkpoints lost")


SAVE_FOR_EVER = """
import itertools, sys, torch
from core.checkpoints.checkpoint import checkpoint_path, write_checkpoint

print("ready", flush=True)
for number in itertools.count(1):
    content = {"epoch": number, "model_state": {"weight": torch.full((1000, 1000), float(number))}}
    write_checkpoint(content, checkpoint_path(sys.argv[1], 1 + number % 2))
"""


def test_whenever_a_process_is_killed_every_checkpoint_there_is_whole(tmp_path):
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while not checkpoints(tmp_path):
            time.sleep(0.01)
        time.sleep(0.53)
        process.send_signal(signal.SIGKILL)
    for path in checkpoints(tmp_path):
        content = read_checkpoint(path)
        assert find_fault(path) is None and content["model_state"]["weight"].eq(content["epoch"]).all()


# --------------------------------------------------------------------------------------------- saved configurations


@pytest.mark.parametrize(
    ("saved", "said"),
    [("{RESNET: {STRIDE_1X1: false}}", "RESNET.STRIDE_1X1 False"), ("{BN: {EPS: 0.001}}", "BN.EPS 0.001")],
)
def test_weights_trained_with_another_setting_that_no_shape_shows_are_refused(saved, said):
    with pytest.raises(ValueError, match=re.escape(f"w.pyth: trained with {said}, here it is")):
        check_saved_settings(saved, get_cfg(), Path("w.pyth"))


@pytest.mark.parametrize(
    "saved",
    [
        "{RESNET: {STRIDE_1X1: true, DEPTH: 3}, BN: {EPS: 1.0e-05}}",
        "{BN: {EPS: 1e-05}}",  # text to PyYAML
        "{RESNET: [1]}",
        "RESNET",
        "{",
        "",
        3,
        None,
    ],
)
def test_a_saved_configuration_that_agrees_or_says_nothing_is_no_hindrance(saved):
    notes = check_saved_settings(saved, get_cfg(), Path("w.pyth"))
    unreadable = saved in ("RESNET", "{", 3)
    assert len(notes) == unreadable and all("its saved configuration cannot be read" in note for note in notes)


def test_changed_settings_are_listed_by_key():
    old = load_cfg(None, ["OPTIM.BASE_LR", "0.2", "TEST.SPLIT", "a.txt", "MODEL.HEADS.SCALE", "30"])
    new = load_cfg(None, ["OPTIM.BASE_LR", "0.3", "MODEL.HEADS.SCALE", "30"])
    expected = [("OPTIM.BASE_LR", 0.2, 0.3), ("TEST.SPLIT", "a.txt", "val_list.txt")]
    assert changed_settings(old.dump(), new) == expected
    assert changed_settings(new.dump(), new) == changed_settings("{OPTIM: {}}", new) == []


def test_every_load_of_weights_holds_the_saved_configuration_against_ours_after_the_architecture(tmp_path):
    path = tmp_path / "r18.pyth"
    small = ["MODEL.DEPTH", "18", "RESNET.TRANS_FUN", "basic_transform", "MODEL.S3_DIM", "256", "MODEL.S4_DIM", "512"]
    small += ["MODEL.HEADS.IN_FEAT", "512", "MODEL.NUM_CLASSES", "3"]
    trained = load_cfg(None, [*small, "BN.EPS", "0.001"])
    torch.save({"model_state": build_classifier(trained).state_dict(), "cfg": trained.dump()}, path)
    weights = ["TEST.WEIGHTS", str(path), "TRAIN.WEIGHTS", str(path)]
    for build, load in ((build_descriptor, load_tested_weights), (build_classifier, load_initial_weights)):
        same = load_cfg(None, [*small, *weights, "BN.EPS", "0.001", "RESNET.STRIDE_1X1", "False"])  # no 1x1 in an R18
        load(same, build(same))
        other = load_cfg(None, [*small, *weights])
        with pytest.raises(ValueError, match="trained with BN.EPS 0.001, here it is 1e-05"):
            load(other, build(other))
        deeper = load_cfg(None, ["MODEL.NUM_CLASSES", "3", *weights])
        with pytest.raises(WeightsError, match="weights of another architecture: MODEL.DEPTH 18"):
            load(deeper, build(deeper))


@pytest.mark.parametrize(
    ("beside", "used", "why"),
    [
        ({"run": {"seed": 1}}, "ema_state", "the moving average of the weights is used"),
        ({"run": {}, "test_err": 1.0, "ema_err": 2.0}, "ema_state", "the moving average of the weights is used"),
        ({"test_err": 23.2, "ema_err": 99.9}, "model_state", "test_err 23.2 is not above ema_err 99.9"),
        ({"test_err": 23.2, "ema_err": 22.9}, "ema_state", "ema_err 22.9 is below test_err 23.2"),
        ({"test_err": 23.2, "ema_err": 23.2}, "model_state", "test_err 23.2 is not above ema_err 23.2"),
        ({"ema_err": 22.9}, "ema_state", "ema_err 22.9 is below test_err 100"),
        ({"test_err": 23.2, "ema_err": float("nan")}, "model_state", "test_err 23.2 is not above ema_err 100"),
        ({"test_err": "23", "ema_err": None}, "model_state", "test_err 100 is not above ema_err 100"),
        ({}, "model_state", "(test_err, ema_err)"),
    ],
)
def test_which_of_two_sets_of_weights_counts(tmp_path, beside, used, why):
    """pycls: `model_state if test_err <= ema_err else ema_state`, 100 for what is not told. Ours: the average."""
    content = {name: {"fc.weight": torch.full((2, 2), value)} for name, value in STATES.items()} | beside
    path = tmp_path / "two.pyth"
    torch.save(content, path)
    chosen, note = better_state(read_checkpoint(path), source=str(path))
    assert chosen["model_state"]["fc.weight"].eq(STATES[used]).all()
    assert note.startswith(f"{path}: the {'last' if used == 'model_state' else 'moving'}") and note.endswith(why)


def test_extraction_takes_the_moving_average_of_a_checkpoint_of_ours(tmp_path):
    small = ["MODEL.DEPTH", "18", "RESNET.TRANS_FUN", "basic_transform", "MODEL.S3_DIM", "256", "MODEL.S4_DIM", "512"]
    path = tmp_path / "averaged.pyth"
    cfg = load_cfg(None, [*small, "MODEL.HEADS.IN_FEAT", "512", "MODEL.NUM_CLASSES", "3", "TEST.WEIGHTS", str(path)])
    last, average = build_classifier(cfg).state_dict(), build_classifier(cfg).state_dict()
    network = build_descriptor(cfg)
    for beside, used, words in (
        ({"run": {"seed": 1}}, average, "the moving average of the weights is used"),
        ({"test_err": 23.2, "ema_err": 99.9}, last, "the last weights are used, not their moving average"),
    ):
        torch.save({"model_state": last, "ema_state": average, **beside}, path)
        _, notes = load_tested_weights(cfg, network)
        assert torch.equal(network.fc.weight, used["fc.weight"])
        assert any(note.startswith(f"{path}: {words}") for note in notes)
