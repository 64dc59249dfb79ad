"""Log lines on stdout or in OUT_DIR/stdout.log, and curves for TensorBoard, from the first process only."""

import logging
import math
import sys
from pathlib import Path

import simplejson
from tqdm import tqdm

JSON_PREFIX = "json_stats: "
LOGGER = logging.getLogger("dolg")


_curves: list["_Curves"] = []  # where the numbers of json_stats go besides, if anywhere


class _Curves:
    """The numbers of json_stats as TensorBoard's scalars, `kind/name`, over iterations or epochs."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TENSORBOARD True needs the package tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(folder)

    def add(self, kind: str, stats: dict) -> None:
        step = int(stats["epoch"].partition("/")[0])
        if "iter" in stats:
            iteration, iterations = map(int, stats["iter"].split("/"))
            step = (step - 1) * iterations + iteration
        place = f"{kind}/{stats['set']}" if "set" in stats else kind
        for name, value in stats.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{place}/{name}", value, step)


class _BesideProgressBars(logging.StreamHandler):
    """Writes lines above the bars on a terminal instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


def setup_logging(log_file: Path | None, *, quiet: bool = False, tensorboard: Path | None = None) -> None:
    """Send log lines to `log_file`, or to stdout where it is None; `quiet` (every process but the first) drops them.

    Numbers go to the folder `tensorboard` besides, where one is given.
    """
    while _curves:
        _curves.pop().writer.close()
    if tensorboard is not None:
        _curves.append(_Curves(tensorboard))
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
    if quiet:
        LOGGER.addHandler(logging.NullHandler())
        return
    handler = logging.FileHandler(log_file) if log_file else _BesideProgressBars(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    LOGGER.addHandler(handler)


def log(message: str) -> None:
    LOGGER.info(message)


def log_stats(kind: str, **stats) -> None:
    """Write `json_stats: {"_type": kind, ...}`, the line that pycls and its plotting tools read."""
    for curves in _curves:
        curves.add(kind, stats)
    LOGGER.info(JSON_PREFIX + simplejson.dumps({"_type": kind, **{k: _rounded(v) for k, v in stats.items()}}))


def _rounded(value):
    """Six significant digits, written without an exponent; null where there is no number."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None  # JSON has no such number
    return simplejson.RawJSON(f"{float(f'{value:.6g}'):.12f}".rstrip("0").rstrip("."))


def read_stats(lines) -> list[dict]:
    """The records of every json_stats line among `lines`."""
    return [simplejson.loads(line.partition(JSON_PREFIX)[2]) for line in lines if JSON_PREFIX in line]
