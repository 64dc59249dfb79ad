"""scripts/plot_run.py as a process, on the log of a real (tiny) training."""

import contextlib
import io

import cv2
import pytest

import train
from core.logging import setup_logging
from tests.small_run import ROOT, SMALL_MODEL, SMALL_TRAINING, landmarks, overrides, python


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """OUT_DIR of two epochs, and a file with the output of one."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        **SMALL_MODEL,
        **SMALL_TRAINING,
        "DATA_LOADER.DATA_DIR": landmarks(folder / "data"),
        "OPTIM.MAX_EPOCH": 2,
        "MODEL.FUSION": "global",
        "LOG_DEST": "both",  # the default
        "OUT_DIR": folder / "a",
    }
    (folder / "empty.yaml").write_text("{}\n")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main(["--cfg", str(folder / "empty.yaml"), *overrides(settings)])
        setup_logging(None, quiet=True)
    assert "json_stats" not in out.getvalue() and "epoch 2/2 validated: loss " in out.getvalue()
    (folder / "captured.txt").write_text((folder / "a" / "stdout.log").read_text())
    return folder


def test_the_curves_of_a_real_run(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    done = python(ROOT / "scripts/plot_run.py", "a", cwd=trained)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a/curves.png\n", "")
    assert cv2.imread(str(trained / "a/curves.png")).shape[1] == 3 * 780  # loss, error, rate
    done = python(ROOT / "scripts/plot_run.py", "a", "captured.txt", "--out", tmp_path / "x.png", cwd=trained)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_a_mistake_is_one_line(trained):
    done = python(ROOT / "scripts/plot_run.py", "data", cwd=trained)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data/stdout.log: no such log; ") and done.stderr.count("\n") == 1
