"""The panels of a picture of training runs: loss, error, learning rate, mAP."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from scripts.plots.run_records import LEVELS, RunCurves, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# After Okabe and Ito: told apart by the colour-blind. Their yellow, too light for a line, is grey here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MARKERS = "os^DvPXp"
DASHES = (0, (4, 1.5))
MARKED: dict[str, Any] = {"linewidth": 1.1, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
Place = Literal["upper right", "lower right"]


class Panel(NamedTuple):
    title: str
    unit: str
    draw: Callable[["Axes"], None]


class Best(NamedTuple):
    """The best point of a line, for the legend."""

    line: "Line2D"
    name: str
    value: float
    epoch: float


def panel_rows(runs: list[RunCurves]) -> list[list[Panel]]:
    """The panels with data, up to three in a row."""
    panels = []
    for title, unit, key in (("Loss", "", "loss"), ("Top-1 error", "%", "top1_err")):
        if any(len(curve(run, key)[0]) for run in runs for curve in (_training_curve, _validation_curve)):
            panels.append(Panel(title, unit, partial(_training_panel, runs=runs, key=key)))
    if any(len(_training_curve(run, "lr")[0]) for run in runs):
        panels.append(Panel("Learning rate", "", partial(_rate_panel, runs=runs)))
    score_rows = _score_rows(runs)
    if len(panels) == 3 and len(score_rows) == 1 and len(score_rows[0]) == 1:
        return [panels[:2], [panels[2], score_rows[0][0]]]
    return [row for row in (panels, *score_rows) if row]


def _score_rows(runs: list[RunCurves]) -> list[list[Panel]]:
    """For one run a panel a set, with a line a level; for several a row a set, with a panel a level."""
    together: list[Panel] = []
    rows: list[list[Panel]] = []
    for name in sorted({name for run in runs for name in run.sets()}):
        by_level = {level: [run.curve(f"retrieval {name}", level) for run in runs] for level in LEVELS}
        if len(runs) == 1:
            lines = [(n, level, *by_level[level][0]) for n, level in enumerate(LEVELS)]
            if any(len(x) for _, _, x, _ in lines):
                together.append(Panel(f"mAP on {name}", "%", partial(_score_panel, lines=lines)))
            continue
        rows.append([])
        for level, curves in by_level.items():
            if any(len(x) for x, _ in curves):
                lines = [(n, "", x, y) for n, (x, y) in enumerate(curves)]
                rows[-1].append(Panel(f"mAP on {name}, {level}", "%", partial(_score_panel, lines=lines)))
    return [*rows, *(together[i : i + 3] for i in range(0, len(together), 3))]


def _training_curve(run: RunCurves, key: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = run.curve("train_iter", key)
    return (x, y) if len(x) else run.curve("train_epoch", key)


def _validation_curve(run: RunCurves, key: str) -> tuple[np.ndarray, np.ndarray]:
    return run.curve("test_epoch", key)


def _training_panel(axes: "Axes", *, runs: list[RunCurves], key: str) -> None:
    """What was logged (thin), its mean over an epoch, and the validation."""
    shown, best = [], []
    for number, run in enumerate(runs):
        ceiling = np.inf
        x, y = _training_curve(run, key)
        if len(x):
            mean = smooth(x, y, min(1.0, (x[-1] - x[0]) / 20))
            if len(runs) <= 3:  # more would be mud
                axes.plot(x, y, color=COLOURS[number], linewidth=0.5, alpha=0.3 if len(runs) == 1 else 0.18)
            axes.plot(x, mean, color=COLOURS[number], linewidth=1.4, marker=_marker(x))
            shown += [mean.min(), mean.max()]
            ceiling = 1.5 * mean.max()
        x, y = _validation_curve(run, key)
        if len(x):
            # The first validations may overflow, since half of their batch norm is that of the start: off the picture.
            x, y = (x[y <= ceiling], y[y <= ceiling]) if y.min() <= ceiling else (x, y)
            line = _marked(axes, x, y, number, len(runs), linestyle=DASHES)
            best.append(Best(line, "", y.min(), x[y.argmin()]))
            shown += [y.min(), y.max()]
    lowest, highest = min(shown), max(shown)
    if key == "loss" and 0 < 20 * lowest < highest:
        _log_axis(axes, steps=(1, 2, 5))
        axes.set_ylim(lowest / 1.15, highest * 1.15)
    else:
        axes.set_ylim(min(0, lowest), highest * 1.05 if highest > 0 else 1)
    unit = "%" if key == "top1_err" else ""
    _list_best(axes, "lowest in validation", sorted(best, key=lambda b: b.value), "upper right", unit)


def _marker(x: np.ndarray) -> str | None:
    """A line of one point would not be seen."""
    return "o" if len(x) == 1 else None


def _rate_panel(axes: "Axes", *, runs: list[RunCurves]) -> None:
    shown = []
    for number, run in enumerate(runs):
        x, y = _training_curve(run, "lr")
        if len(x):
            # Equal schedules lie on each other: the later, the thinner.
            width = 1.4 + 0.5 * (len(runs) - 1 - number)
            axes.plot(x, y, color=COLOURS[number], linewidth=width, marker=_marker(x))
            shown += [y.min(), y.max()]
    lowest, highest = min(shown), max(shown)
    if 0 < 50 * lowest < highest:
        _log_axis(axes, steps=(1,) if highest > 1000 * lowest else (1, 2, 5))
    else:
        axes.set_ylim(min(0, lowest), highest * 1.05 if highest > 0 else 1)


def _score_panel(axes: "Axes", *, lines: list[tuple[int, str, np.ndarray, np.ndarray]]) -> None:
    """Draw (number of the colour, name in the panel, epochs, values) each."""
    best = []
    for number, name, x, y in lines:
        if len(x):
            line = _marked(axes, x, y, number, len(lines))
            best.append(Best(line, name, y.max(), x[y.argmax()]))
    _list_best(axes, "highest", sorted(best, key=lambda b: -b.value), "lower right", "%")


def _marked(axes: "Axes", x: np.ndarray, y: np.ndarray, number: int, lines: int, **style) -> "Line2D":
    """A line with about 12 marks, which `lines` lines set at different places."""
    every = max(1, len(x) // 12)
    marks = (every * number // lines, every)
    return axes.plot(x, y, color=COLOURS[number], marker=MARKERS[number], markevery=marks, **MARKED, **style)[0]


def _log_axis(axes: "Axes", *, steps: tuple[int, ...]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _list_best(axes: "Axes", title: str, best: list[Best], place: Place, unit: str) -> None:
    if not best:
        return
    value = "{:.2f} %" if unit == "%" else "{:.4g}"
    texts = [f"{b.name} {value.format(b.value)} (epoch {b.epoch:g})".lstrip() for b in best]
    legend = axes.legend([b.line for b in best], texts, title=title, loc=place, fontsize=8, title_fontsize=8)
    legend.set_frame_on(True)
    legend.get_frame().set(edgecolor="none", alpha=0.75)
