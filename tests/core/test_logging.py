import json
import logging
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from core.logging import LOGGER, log, log_failure, log_stats, read_stats, setup_logging


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    setup_logging(None, quiet=True)


def test_lines_go_to_stdout_with_the_time(capsys):
    setup_logging(None)
    log("hello")
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("] hello\n") and len(out) == len("[2000-01-01 00:00:00] hello\n")


def test_lines_go_to_the_file_alone_and_are_appended(tmp_path, capsys):
    path = tmp_path / "stdout.log"
    for message in ("first", "second"):
        setup_logging(path, dest="file")
        log(message)
    assert [line.split("] ")[1] for line in path.read_text().splitlines()] == ["first", "second"]
    assert capsys.readouterr() == ("", "")


RECORDS = [
    ("train_iter", {"epoch": "3/9", "iter": "20/400", "lr": 0.01, "loss": 12.34567, "top1_err": 99.0, "eta": "1:00"}),
    ("train_epoch", {"epoch": "3/9", "loss": 12.34567, "images_per_s": 210.456, "mem": 4000}),
    ("test_epoch", {"epoch": "3/9", "loss": math.nan, "top1_err": 98.7654, "min_top1_err": 97.5, "images": 5}),
    ("retrieval", {"epoch": "3/9", "set": "toy", "easy": None, "medium": 61.254, "hard": 40.0}),
]
SHORT = [
    "epoch 3/9, 20/400: loss 12.35, top-1 error 99 %, rate 0.01, 1:00 left",
    "epoch 3/9 trained: loss 12.35, 210.5 images/s",
    "epoch 3/9 validated: loss nan, top-1 error 98.77 %, lowest 97.5 %",
    "epoch 3/9, toy: mAP easy -, medium 61.25, hard 40",
]


@pytest.mark.parametrize("dest", ["both", "stdout", "file"])
def test_the_file_has_every_line_and_stdout_what_was_asked_for(tmp_path, capsys, dest):
    setup_logging(tmp_path / "stdout.log", dest=dest)
    log("saved a checkpoint")
    for kind, stats in RECORDS:
        log_stats(kind, **stats)
    written = (tmp_path / "stdout.log").read_text()
    assert [record["_type"] for record in read_stats(written.splitlines())] == [kind for kind, _ in RECORDS]
    out = capsys.readouterr().out
    if dest == "both":
        assert [line.split("] ", 1)[1] for line in out.splitlines()] == ["saved a checkpoint", *SHORT]
    else:
        assert out == (written if dest == "stdout" else "")


def test_iterations_are_not_repeated_beside_a_live_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    setup_logging(tmp_path / "stdout.log", dest="both")
    for kind, stats in RECORDS[:2]:
        log_stats(kind, **stats)
    assert [line.split("] ", 1)[1] for line in capsys.readouterr().out.splitlines()] == SHORT[1:2]
    assert len((tmp_path / "stdout.log").read_text().splitlines()) == 2


def test_a_failure_is_in_the_file_alone(tmp_path, capsys):
    setup_logging(tmp_path / "stdout.log", dest="both")
    log_failure(FloatingPointError("the loss is\nnot finite"))
    assert (tmp_path / "stdout.log").read_text().endswith("] ended by FloatingPointError: the loss is not finite\n")
    assert capsys.readouterr() == ("", "")


def test_a_log_file_that_cannot_be_written_is_told_of_once(tmp_path, capsys):
    (tmp_path / "full").symlink_to("/dev/full")
    for path, reason in ((tmp_path / "full", "No space left on device"), (tmp_path, "Is a directory")):
        setup_logging(path, dest="both")
        for number in range(3):
            log(f"line {number}")
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 3
        assert err == f"note: {path} cannot be written ({reason}); training goes on\n"


def test_lines_stay_whole_when_the_disk_was_full_for_a_while(tmp_path, capsys):
    setup_logging(tmp_path / "stdout.log", dest="file")
    log("first")
    (handler,) = LOGGER.handlers
    file = handler.file
    handler.file = SimpleNamespace(write=lambda data: file.write(data[:30]), close=file.close)
    log("a longer line, of which a part fits")
    handler.file = file
    log("last")
    lines = (tmp_path / "stdout.log").read_text().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["first", "a longer", "last"]


def test_any_name_can_be_logged(tmp_path, capsys):
    setup_logging(tmp_path / "stdout.log", dest="both")
    log("故宫 \udcff.jpg")
    assert "故宫 \\udcff.jpg" in (tmp_path / "stdout.log").read_text(encoding="utf-8")


def test_a_full_disk_under_tensorboard_ends_its_curves_alone(tmp_path, monkeypatch, capsys):
    class Writer:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, step):
            raise OSError(28, "No space left on device")

        close = add_scalar

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    setup_logging(None, tensorboard=tmp_path)
    for number in (1, 2):
        log_stats("train_epoch", epoch=f"{number}/9", loss=1.5)
    out = capsys.readouterr().out
    assert len(read_stats(out.splitlines())) == 2 and out.count("No space left on device") == 1


def test_quiet_processes_say_nothing(capsys):
    setup_logging(None, quiet=True)
    log("hello")
    log_stats("train_iter", loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_setting_up_twice_doubles_no_line(capsys):
    setup_logging(None)
    setup_logging(None)
    log("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert len(LOGGER.handlers) == 1


def test_the_root_logger_hears_nothing(capsys, caplog):
    setup_logging(None)
    with caplog.at_level(logging.INFO):
        log("hello")
    assert caplog.records == [] and capsys.readouterr().out.count("hello") == 1


def test_json_stats_lines_read_back(capsys):
    setup_logging(None)
    log("not a record")
    log_stats("train_iter", epoch="1/100", iter="10/20", lr=1e-5, loss=math.pi * 1000, images=64, mem=0, top1_err=100.0)
    log_stats("test_epoch", loss=np.float64(0.1) + 0.2)
    lines = capsys.readouterr().out.splitlines()
    assert 'json_stats: {"_type": "train_iter", "epoch": "1/100", "iter": "10/20", ' in lines[1]
    records = read_stats(lines)
    assert records == [
        {
            "_type": "train_iter",
            "epoch": "1/100",
            "iter": "10/20",
            "lr": 1e-5,
            "loss": 3141.59,
            "images": 64,
            "mem": 0,
            "top1_err": 100.0,
        },
        {"_type": "test_epoch", "loss": 0.3},
    ]
    assert json.loads(lines[1].split("json_stats: ")[1]) == records[0]  # any JSON reader will do


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1e-5, "0.00001"),
        (1e-9, "0.000000001"),
        (0.0, "0"),
        (-1e-30, "-0"),
        (math.nan, "null"),
        (-math.inf, "null"),
        (100.0, "100"),
        (123456.789, "123457"),
        (1234567.89, "1234570"),
        (-0.5, "-0.5"),
        (1 / 3, "0.333333"),
        (7, "7"),
        (True, "true"),
    ],
)
def test_numbers_have_six_digits_and_no_exponent(capsys, value, written):
    setup_logging(None)
    log_stats("x", value=value)
    assert capsys.readouterr().out.endswith(f'{{"_type": "x", "value": {written}}}\n')


def test_numbers_go_to_tensorboard_over_iterations_and_epochs(tmp_path, monkeypatch, capsys):
    written, closed = [], []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    setup_logging(None, tensorboard=tmp_path)
    log_stats("train_iter", epoch="3/9", iter="20/400", loss=1.5, eta="0:01:00")
    log_stats("test_epoch", epoch="3/9", top1_err=40.0)
    log_stats("retrieval", epoch="4/9", set="toy", medium=12.5, hard=None)
    setup_logging(None, quiet=True)
    assert written == [
        ("train_iter/loss", 1.5, 820),
        ("test_epoch/top1_err", 40.0, 3),
        ("retrieval/toy/medium", 12.5, 4),
    ]
    assert closed == [True]


def test_without_tensorboard_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        setup_logging(None, tensorboard=tmp_path)
