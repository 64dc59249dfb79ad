"""OUT_DIR: made when everything has been checked, and not left behind by a run that saved nothing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from yacs.config import CfgNode

from core.base.errors import UserError, is_user_error
from core.base.files import atomic_write
from core.checkpoints.checkpoint import FOLDER, checkpoints
from core.processes.distributed import is_main

LOG_NAME = "stdout.log"


def log_file(cfg: CfgNode) -> Path:
    return Path(cfg.OUT_DIR) / LOG_NAME


def tensorboard_folder(cfg: CfgNode) -> Path | None:
    return Path(cfg.OUT_DIR) / "tensorboard" if cfg.TENSORBOARD and is_main() else None


def write_config(cfg: CfgNode) -> None:
    """Make OUT_DIR and write the configuration in effect to it."""
    try:
        with atomic_write(Path(cfg.OUT_DIR) / cfg.CFG_DEST) as file:
            file.write(cfg.dump().encode())
    except OSError as error:
        raise UserError(f"OUT_DIR {cfg.OUT_DIR} cannot be written: {error.strerror}") from None


def check_writable(folder: Path) -> None:
    """Raise `UserError` if `folder` cannot be made or written into; nothing is made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{folder} cannot be made: {nearest} is a file; name another OUT_DIR")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: no permission in {nearest}; name another OUT_DIR")


@contextlib.contextmanager
def output_folder(cfg: CfgNode) -> Iterator[None]:
    """Leave no OUT_DIR behind that was not there, if the run within fails before its first checkpoint.

    What it made is removed again: the configuration, and folders if they are empty. A log is removed after a user's
    mistake, whose message is printed; after another failure it stays, and the configuration with it.

    Around the run as a whole rather than in its first process, which is ended when another one fails.
    """
    out_dir = Path(cfg.OUT_DIR)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"OUT_DIR {out_dir} is a file, name a folder")
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        log = out_dir / LOG_NAME
        if made and not checkpoints(out_dir) and (is_user_error(error) or not log.exists()):
            for remove in (log.unlink, (out_dir / cfg.CFG_DEST).unlink, *(f.rmdir for f in (out_dir / FOLDER, *made))):
                with contextlib.suppress(OSError):  # absent, or a folder that is not empty
                    remove()
        raise
