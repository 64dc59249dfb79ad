"""Curves from logs: known values, resumed and torn logs, and a PNG that is really drawn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.checkpoints import output
from core.logging import log_stats, setup_logging
from scripts.plots import run_records
from scripts.plots.run_plot import DPI, PANEL, draw, main, plot_runs
from scripts.plots.run_records import position, read_run, run_names, smooth
from tests.small_run import ROOT, child_environment


@pytest.fixture(scope="session", autouse=True)
def matplotlib_folder(tmp_path_factory):
    """Its cache of fonts, which must not go to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


def line(kind: str, epoch: int, iteration: int | None = None, *, of: int = 4, **values) -> str:
    place = {"epoch": f"{epoch}/9"} | ({} if iteration is None else {"iter": f"{iteration}/{of}"})
    return f"[2026-01-01 00:00:00] json_stats: {json.dumps({'_type': kind, **place, **values})}\n"


def epochs(first: int, last: int, *, offset: float = 0, retrieval: bool = True) -> str:
    """The log of some epochs of 4 iterations; values tell their place."""
    text = ""
    for e in range(first, last + 1):
        for i in (2, 4):
            text += line("train_iter", e, i, loss=e - 1 + i / 4 + offset, top1_err=50 - e, lr=0.1 / e)
        text += line("train_epoch", e, loss=e + offset, top1_err=50 - e, lr=0.1 / e)
        text += line("test_epoch", e, loss=10 * e + offset, top1_err=60 - e)
        if retrieval:
            text += line("retrieval", e, set="toy", easy=70 + e, medium=60 + e + offset, hard=None)
    return text


def run_of(tmp_path: Path, text: str, name: str = "run") -> Path:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "stdout.log").write_text(text)
    return tmp_path / name


def test_the_lines_that_training_writes_are_read(tmp_path):
    setup_logging(tmp_path / "stdout.log")
    log_stats("train_iter", epoch="3/100", iter="100/400", loss=math.pi, top1_err=12.5, lr=1e-5)
    log_stats("train_iter", epoch="3/100", iter="400/400", loss=math.nan, top1_err=12.0, lr=1e-5)
    log_stats("retrieval", epoch="3/100", set="roxford5k", easy=None, medium=61.25, hard=40.0)
    log_stats("start", devices=8)
    setup_logging(None, quiet=True)
    run = read_run(tmp_path)
    assert [values.tolist() for values in run.curve("train_iter", "loss")] == [[2.25], [3.14159]]
    assert [values.tolist() for values in run.curve("train_iter", "top1_err")] == [[2.25, 3.0], [12.5, 12.0]]
    assert [values.tolist() for values in run.curve("retrieval roxford5k", "medium")] == [[3.0], [61.25]]
    assert [values.tolist() for values in run.curve("retrieval roxford5k", "easy")] == [[], []]
    assert (run.sets(), run.torn) == (["roxford5k"], 0)


@pytest.mark.parametrize(
    ("epoch", "iteration", "x"), [("1/9", "1/4", 0.25), ("3/9", "4/4", 3), ("3/9", None, 3), ("0/9", None, 0)]
)
def test_positions(epoch, iteration, x):
    assert position({"epoch": epoch} | ({"iter": iteration} if iteration else {})) == x


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    """Epochs 1-5 and half of 6, a torn line, then again from the middle of epoch 4; stale records are gone."""
    half = line("train_iter", 6, 2, loss=5.5, top1_err=0, lr=0)
    again = epochs(4, 4, offset=0.125).split("\n", 1)[1]  # without the first iterations of epoch 4
    text = epochs(1, 5) + half + half[:60] + again
    run = read_run(run_of(tmp_path, text))
    x, y = run.curve("train_iter", "loss")
    assert x.tolist() == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert y.tolist() == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4.125]
    assert [v.tolist() for v in run.curve("test_epoch", "loss")] == [[1, 2, 3, 4], [10, 20, 30, 40.125]]
    assert [v.tolist() for v in run.curve("retrieval toy", "medium")] == [[1, 2, 3, 4], [61, 62, 63, 64.125]]
    assert run.torn == 1
    run = read_run(run_of(tmp_path, text + epochs(5, 9)))
    assert run.curve("test_epoch", "loss")[1].tolist() == [10, 20, 30, 40.125, 50, 60, 70, 80, 90]
    assert len(run.curve("train_iter", "loss")[0]) == 18


def test_just_after_resuming_the_validation_of_lost_epochs_is_gone(tmp_path):
    run = read_run(run_of(tmp_path, epochs(1, 5) + line("train_iter", 4, 2, loss=1.0)))
    assert run.curve("train_iter", "loss")[0].tolist() == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    for kind in ("test_epoch", "train_epoch"):
        assert run.curve(kind, "loss")[0].tolist() == [1, 2, 3]
    assert run.curve("retrieval toy", "easy")[0].tolist() == [1, 2, 3]
    run = read_run(run_of(tmp_path, epochs(1, 3) + line("train_iter", 3, 4, loss=1.0)))
    assert run.curve("test_epoch", "loss")[0].tolist() == [1, 2]


def test_a_score_that_comes_late_drops_nothing(tmp_path):
    late = line("retrieval", 2, set="toy", medium=1.0) * 2 + line("retrieval", 2, set="other", medium=2.0)
    run = read_run(run_of(tmp_path, epochs(1, 3, retrieval=False) + late))
    assert len(run.curve("train_iter", "loss")[0]) == 6
    assert run.curve("test_epoch", "loss")[0].tolist() == [1, 2, 3]
    assert run.sets() == ["other", "toy"]


def test_two_runs_in_one_log_leave_the_second(tmp_path):
    run = read_run(run_of(tmp_path, epochs(1, 5) + epochs(1, 2, offset=0.5)))
    assert run.curve("train_epoch", "loss")[1].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "bad",
    [
        'json_stats: {"_type": "train_iter", "epoch": "3/9", "iter": "1/4", "lo',
        "json_stats: []",
        "json_stats: 3",
        'json_stats: {"_type": "train_iter"}',
        'json_stats: {"_type": "train_iter", "epoch": 3, "iter": "1/4"}',
        'json_stats: {"_type": "train_iter", "epoch": "3/9", "iter": "1/0"}',
        'json_stats: {"_type": "test_epoch", "epoch": "x/9"}',
        'json_stats: {"_type": "test_epoch", "epoch": "%s/9"}' % ("9" * 400),
        'json_stats: {"_type": "retrieval", "epoch": "3/9"}',
        "json_stats: " + "[" * 100_000,
    ],
)
def test_what_is_no_record_is_counted_and_left_out(tmp_path, bad):
    run = read_run(run_of(tmp_path, epochs(1, 2) + bad + "\n" + epochs(3, 3)))
    expected = read_run(run_of(tmp_path, epochs(1, 3)))
    assert run.kinds == expected.kinds
    assert run.torn == 1


@pytest.mark.parametrize("value", ["1.0", True, [1], None, math.nan, math.inf, 10**400])
def test_what_is_no_number_is_left_out_of_a_curve(tmp_path, value):
    text = line("test_epoch", 1, loss=1.0) + line("test_epoch", 2, loss=value) + line("test_epoch", 3)
    assert read_run(run_of(tmp_path, text)).curve("test_epoch", "loss")[0].tolist() == [1]


def test_a_file_that_has_nothing_to_draw_is_named(tmp_path):
    out = run_of(tmp_path, "no records\n")
    for path in (out, out / "stdout.log"):
        with pytest.raises(ValueError, match=r"run/stdout\.log: no json_stats line with an epoch"):
            read_run(path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ValueError, match=rf"{path}\S*: no such log; give the OUT_DIR of a training run"):
            read_run(path)
    with pytest.raises(ValueError, match=r"stdout\.log: no loss, error, rate or mAP"):
        plot_runs([run_of(tmp_path, line("train_epoch", 1, mem=3))], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_smoothing_is_the_mean_of_the_neighbours():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.uniform(0.05, 0.3, 60))
    y = rng.normal(size=60)
    slow = [np.mean([b for a, b in zip(x, y, strict=True) if abs(a - at) <= 0.5]) for at in x]
    np.testing.assert_allclose(smooth(x, y, 1.0), slow, atol=1e-12)
    assert smooth(x, y, 0.0) == pytest.approx(y)
    exact = np.arange(1, 9) / 10  # neighbours at exactly half the width, which no sum of tenths hits
    assert smooth(exact, exact**2, 0.2)[3] == pytest.approx((0.09 + 0.16 + 0.25) / 3)


def test_runs_are_named_by_as_much_of_their_path_as_it_takes(tmp_path):
    for name in ("a/r50", "b/r50", "c/r101"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "captured.txt").touch()
    a, b, c, log = (tmp_path / name for name in ("a/r50", "b/r50", "c/r101", "captured.txt"))
    assert run_names([a, c / "stdout.log", log]) == ["r50", "r101", "captured"]
    assert run_names([a, b, c]) == ["a/r50", "b/r50", "c/r101"]
    assert run_names([a, a]) == ["r50", "r50"]


# ------------------------------------------------------------------------------------------------------- the picture


def drawn(tmp_path, *texts: str, names: list[str] | None = None):
    """A figure of logs, with its panels by title."""
    runs = [read_run(run_of(tmp_path, text, f"run{i}")) for i, text in enumerate(texts)]
    figure = draw(runs, names or [f"run{i}" for i in range(len(runs))])
    return figure, {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}


def test_every_panel_shows_the_values_of_the_log(tmp_path):
    _, panels = drawn(tmp_path, epochs(1, 5))
    assert list(panels) == ["Loss", "Top-1 error", "Learning rate", "mAP on toy"]
    raw, _, validation = panels["Loss"].lines
    assert raw.get_xydata().tolist() == [[x, x] for x in np.arange(0.5, 5.5, 0.5).tolist()]
    error = panels["Top-1 error"].lines[2].get_xydata().tolist()
    assert error == [[e, 60 - e] for e in range(1, 6)]
    assert validation.get_marker() not in (None, "None")
    assert panels["Learning rate"].lines[0].get_ydata()[-1] == 0.1 / 5
    assert [line.get_ydata()[-1] for line in panels["mAP on toy"].lines] == [75, 65]  # hard is null
    assert [text.get_text() for text in panels["mAP on toy"].get_legend().get_texts()] == [
        "easy 75.00 % (epoch 5)",
        "medium 65.00 % (epoch 5)",
    ]


def test_panels_without_data_are_left_out(tmp_path):
    scores = line("retrieval", 1, set="toy", easy=None, medium=None, hard=None)
    _, panels = drawn(tmp_path, line("train_epoch", 1, loss=1.0) + scores)
    assert list(panels) == ["Loss"]
    _, panels = drawn(tmp_path, line("test_epoch", 1, top1_err=1.0), line("train_iter", 1, 1, lr=0.1) + scores)
    assert list(panels) == ["Top-1 error", "Learning rate"]


def test_several_runs_have_a_panel_for_every_level_and_the_best_first(tmp_path):
    text = line("retrieval", 3, set="other", hard=50.0)
    figure, panels = drawn(tmp_path, epochs(1, 5), epochs(1, 4, offset=5) + text, names=["_a $1$", "b"])
    assert list(panels)[3:] == ["mAP on other, hard", "mAP on toy, easy", "mAP on toy, medium"]
    best = panels["mAP on toy, medium"].get_legend().get_texts()
    assert [text.get_text() for text in best] == ["69.00 % (epoch 4)", "65.00 % (epoch 5)"]
    assert panels["mAP on other, hard"].lines[0].get_color() == panels["mAP on toy, easy"].lines[1].get_color()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [" _a $1$", "b", "training", "validation"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())


def test_a_first_validation_that_overflowed_does_not_flatten_the_rest(tmp_path):
    text = epochs(1, 5).replace('"loss": 10,', '"loss": 1e+30,').replace('"loss": 20,', '"loss": 3.5,')
    _, panels = drawn(tmp_path, text, text)
    assert panels["Loss"].get_ylim()[1] < 10
    (first, *_) = [line for line in panels["Loss"].lines if line.get_marker() != "None"]
    assert first.get_xdata().tolist() == [2]


def test_scales(tmp_path):
    falling = "".join(line("train_iter", e, 4, loss=30.0 * 0.3**e, lr=0.1 * 0.1**e) for e in range(1, 6))
    _, panels = drawn(tmp_path, falling)
    assert {axes.get_yscale() for axes in panels.values()} == {"log"}
    _, panels = drawn(tmp_path, falling.replace('"lr": ', '"lr": 0, "x": ').replace('"loss": ', '"loss": -'))
    assert {axes.get_yscale() for axes in panels.values()} == {"linear"}


@pytest.mark.parametrize(("runs", "panels"), [(1, (2, 2)), (3, (3, 2)), (8, (3, 2))])
def test_a_picture_of_the_expected_size_is_written(tmp_path, recwarn, runs, panels):
    paths = [run_of(tmp_path, epochs(1, 5, offset=i), f"a rather long name of a run, number {i}") for i in range(runs)]
    plot_runs(paths, tmp_path / "new" / "c.PNG")
    image = cv2.imread(str(tmp_path / "new" / "c.PNG"))
    height, width = image.shape[:2]
    assert width == round(panels[0] * PANEL[0] * DPI)
    assert panels[1] * PANEL[1] * DPI < height < (panels[1] * PANEL[1] + 1.5) * DPI
    assert 0.02 < (image < 250).any(2).mean() < 0.5
    assert not recwarn.list
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["c.PNG"]


def test_the_log_has_the_name_that_training_gives_it_and_torch_is_not_needed():
    assert run_records.LOG_NAME == output.LOG_NAME
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(ROOT)!r}); import scripts.plots.run_plot"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_command_refuses(tmp_path, capsys):
    run = str(run_of(tmp_path, epochs(1, 1)))
    for arguments, said in (
        ([run] * 9, "9 runs: at most 8"),
        ([run, "--out", "x.pdf"], "--out x.pdf: the curves are drawn as a PNG"),
        ([run, str(tmp_path / "absent")], f"{tmp_path}/absent: no such log"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path):
    run = run_of(tmp_path, epochs(1, 1))
    code = f"import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"from scripts.plots.run_plot import main; main([{str(run)!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: curves are drawn with matplotlib, which is not installed: pip install matplotlib\n"
