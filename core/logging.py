"""Log lines on stdout or in OUT_DIR/stdout.log, from the first process only."""

import logging
import math
import sys
from pathlib import Path

import simplejson
from tqdm import tqdm

JSON_PREFIX = "json_stats: "
LOGGER = logging.getLogger("dolg")


class _BesideProgressBars(logging.StreamHandler):
    """Writes lines above the bars on a terminal instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


def setup_logging(log_file: Path | None, *, quiet: bool = False) -> None:
    """Send log lines to `log_file`, or to stdout where it is None; `quiet` (every process but the first) drops them."""
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
