"""Log lines in OUT_DIR/stdout.log and on stdout, and curves for TensorBoard, from the first process only.

Nothing here ends a run: what cannot be written is told of once and left out.
"""

import contextlib
import errno
import io
import logging
import math
import os
import sys
from pathlib import Path

import simplejson
from tqdm import tqdm

from core.base.errors import UserError
from core.base.terminal import one_line, work_goes_on

JSON_PREFIX = "json_stats: "
LOGGER = logging.getLogger("dolg")


_curves: list["_Curves"] = []  # where the numbers of json_stats go besides, if anywhere


class _Curves:
    """The numbers of json_stats as TensorBoard's scalars, `kind/name`, over iterations or epochs."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("TENSORBOARD True needs the package tensorboard: pip install tensorboard") from None
        self.folder, self.writer = folder, SummaryWriter(folder)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk
            self.writer.close()

    def add(self, kind: str, stats: dict) -> None:
        step = int(stats["epoch"].partition("/")[0])
        if "iter" in stats:
            iteration, iterations = map(int, stats["iter"].split("/"))
            step = (step - 1) * iterations + iteration
        place = f"{kind}/{stats['set']}" if "set" in stats else kind
        for name, value in stats.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{place}/{name}", value, step)


class _OnStdout(logging.Handler):
    """Writes above the bars on a terminal instead of into them; json_stats as short lines if `short`."""

    def __init__(self, *, short: bool):
        super().__init__()
        self.stream, self.short = sys.stdout, short

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "in_file_only", False):
            return
        with contextlib.suppress(OSError, ValueError):  # where `safe_streams` has not seen to it
            stats = getattr(record, "stats", None)
            if stats is not None and self.short:
                if stats["_type"] == "train_iter" and sys.stderr is not None and sys.stderr.isatty():
                    return  # the bar shows it
                record = logging.makeLogRecord(record.__dict__ | {"msg": short_line(stats), "args": ()})
            tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()


class _InFile(logging.Handler):
    """Appends whole lines to a file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.torn, self.told = path, False, False
        self.file: io.FileIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            if self.file is None:
                self.file = self.path.open("ab", buffering=0)
            if self.torn:
                line = b"\n" + line
            self.torn = self.file.write(line) < len(line)
            if self.torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self.told:
                self.told = True
                print(f"note: {self.path} cannot be written ({error.strerror}); training goes on", file=sys.stderr)

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
        super().close()


def setup_logging(
    log_file: Path | None, *, dest: str = "stdout", quiet: bool = False, tensorboard: Path | None = None
) -> None:
    """Send log lines to `log_file`, and to stdout as LOG_DEST says; `quiet` (every process but the first) drops them.

    `dest` is `both` (short lines on stdout), `stdout` (the lines of the file) or `file` (none). Numbers go to the
    folder `tensorboard` besides, where one is given.
    """
    while _curves:
        _curves.pop().close()
    if tensorboard is not None:
        _curves.append(_Curves(tensorboard))
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
    handlers: list[logging.Handler] = []
    if not quiet and log_file is not None:
        handlers.append(_InFile(log_file))
    if not quiet and dest != "file":
        handlers.append(_OnStdout(short=dest == "both"))
    for handler in handlers or [logging.NullHandler()]:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(handler)
    work_goes_on(_tell)


def _tell(message: str) -> None:
    """Say what became of stdout or stderr wherever something can still be written."""
    print(f"note: {message}", file=sys.stderr)
    log(message)


def log(message: str) -> None:
    LOGGER.info(message)


def log_failure(error: BaseException) -> None:
    """A line in the file alone: stderr shows the error too, but the terminal of a long run may be gone."""
    LOGGER.info(one_line(f"ended by {type(error).__name__}: {error}"), extra={"in_file_only": True})


def log_stats(kind: str, **stats) -> None:
    """Write `json_stats: {"_type": kind, ...}`, the line that pycls and its plotting tools read."""
    for curves in list(_curves):
        try:
            curves.add(kind, stats)
        except OSError as error:
            _curves.remove(curves)
            log(f"TensorBoard's curves end here: {curves.folder} cannot be written ({error.strerror or error})")
    record = {"_type": kind, **stats}
    line = JSON_PREFIX + simplejson.dumps({key: _rounded(value) for key, value in record.items()})
    LOGGER.info(line, extra={"stats": record})


def short_line(stats: dict) -> str:
    """A record of json_stats as people read it, e.g. `epoch 3/100, 120/400: loss 9.124, top-1 error 98.4 %`."""
    values = {key: value for key, value in stats.items() if key != "_type"}
    place = ", ".join(str(values.pop(key)) for key in ("epoch", "iter", "set") if key in values)
    if stats["_type"] == "retrieval":
        return f"epoch {place}: mAP " + ", ".join(f"{key} {_short(value)}" for key, value in values.items())
    title = {"train_epoch": " trained", "test_epoch": " validated"}.get(stats["_type"], "")
    parts = [words.format(_short(values[key])) for key, words in _SHORT.items() if key in values]
    return f"epoch {place}{title}: " + ", ".join(parts)


# What a short line tells of a record, in this order.
_SHORT = {
    "loss": "loss {}",
    "top1_err": "top-1 error {} %",
    "min_top1_err": "lowest {} %",
    "lr": "rate {}",
    "images_per_s": "{} images/s",
    "eta": "{} left",
}


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
