import json
import logging
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from core.logging import LOGGER, log, log_stats, read_stats, setup_logging


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
        setup_logging(path)
        log(message)
    assert [line.split("] ")[1] for line in path.read_text().splitlines()] == ["first", "second"]
    assert capsys.readouterr() == ("", "")


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
