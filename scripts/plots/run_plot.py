"""Curves of training runs in a PNG: loss, errors, learning rate and mAP (entry file: scripts/plot_run.py)."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.files import atomic_write
from scripts.plots.run_panels import COLOURS, DASHES, MARKED, MARKERS, panel_rows
from scripts.plots.run_records import RunCurves, read_run, run_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
PANEL = (5.2, 3.5)  # inches
STYLE: dict[Any, Any] = {  # matplotlib lists all of its keys in a type
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="plot_run.py",
        description="Draw loss, top-1 error, learning rate and mAP of up to eight training runs, from the json_stats "
        "lines of their logs. Where a run was resumed, what it did again replaces what it had done before.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="OUT_DIR",
        help="OUT_DIR of a run, or a file with the output of one that had LOG_DEST stdout",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: curves.png in the first OUT_DIR")
    options = parser.parse_args(argv)
    first = options.runs[0]
    out = options.out or (first if first.is_dir() else first.parent) / "curves.png"
    plot_runs(options.runs, out)
    print(out)


def plot_runs(paths: list[Path], out: Path) -> None:
    """Draw the runs into the PNG `out`. Raises UserError for a log without records and for too many runs."""
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs: at most {len(COLOURS)} can be told apart in one picture")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the curves are drawn as a PNG, name a file that ends in .png")
    runs = [read_run(path) for path in paths]
    for run in runs:
        if run.torn:
            print(f"note: {run.file}: {run.torn} json_stats lines are torn or foreign and left out", file=sys.stderr)
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("curves are drawn with matplotlib, which is not installed: pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # The user's own style file must not move things; the backend is what FigureCanvasAgg says.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **STYLE}):
        figure = draw(runs, run_names(paths))
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
    with atomic_write(out) as file:
        file.write(image.getvalue())


def draw(runs: list[RunCurves], names: list[str]) -> "Figure":
    """A panel for everything that at least one of the runs has data for, and a legend above them."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    rows = panel_rows(runs)
    if not rows:
        raise UserError(f"{', '.join(str(run.file) for run in runs)}: no loss, error, rate or mAP, so nothing to draw")
    width = PANEL[0] * max(map(len, rows))
    names = [name if len(name) <= 60 else f"{name[:20]}…{name[-39:]}" for name in names]
    entries = len(names) + 2
    columns = max(1, min(entries, int(width / (0.5 + 0.08 * max(map(len, [*names, "validation"]))))))
    head = 0.3 + 0.22 * -(-entries // columns)  # inches above the panels
    height = PANEL[1] * len(rows) + head
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    grid = figure.add_gridspec(len(rows), 6)  # one, two or three panels fill a row
    for number, row in enumerate(rows):
        share = 6 // len(row)
        for place, panel in enumerate(row):
            axes = figure.add_subplot(grid[number, place * share : (place + 1) * share])
            panel.draw(axes)
            axes.set(title=panel.title, xlabel="epoch", ylabel=panel.unit)
    first, last = min(axes.dataLim.x0 for axes in figure.axes), max(axes.dataLim.x1 for axes in figure.axes)
    margin = 0.02 * (last - first) or 0.5
    for axes in figure.axes:
        axes.set_xlim(first - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=last - first >= 3))
    _legend(figure, names, columns=columns, top=1 - 0.12 / height)
    return figure


def _legend(figure: "Figure", names: list[str], *, columns: int, top: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[n], marker=MARKERS[n], **{**MARKED, "linewidth": 2}) for n in range(len(names))
    ]
    handles.append(Line2D([], [], color="#555555", linewidth=1.4))
    handles.append(Line2D([], [], color="#555555", linestyle=DASHES, marker="o", **MARKED))
    # matplotlib leaves out what begins with an underscore
    labels = [f" {name}" if name.startswith("_") else name for name in [*names, "training", "validation"]]
    place = (0.5, top)
    legend = figure.legend(handles, labels, ncols=columns, loc="upper center", bbox_to_anchor=place, borderaxespad=0)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $
