"""OUT_DIR: made when everything has been checked, and not left behind by a run that saved nothing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from yacs.config import CfgNode

from core.checkpoint import newest_checkpoint
from core.environment import atomic_write, is_user_error

LOG_NAME = "stdout.log"


def log_file(cfg: CfgNode) -> Path | None:
    return Path(cfg.OUT_DIR) / LOG_NAME if cfg.LOG_DEST == "file" else None


@contextlib.contextmanager
def output_folder(cfg: CfgNode) -> Iterator[None]:
    """Make OUT_DIR and write the configuration in effect to it.

    If the run then fails before its first checkpoint, what was made here is removed again: the configuration, and the
    folders that were not there and are empty. The log goes only after a user's mistake, whose message has been printed.
    """
    out_dir = Path(cfg.OUT_DIR)
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"OUT_DIR {out_dir} is a file, name a folder")
    had_checkpoint = newest_checkpoint(out_dir) is not None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(out_dir / cfg.CFG_DEST) as file:
            file.write(cfg.dump().encode())
    except OSError as error:
        raise ValueError(f"OUT_DIR {out_dir} cannot be written: {error.strerror}") from None
    try:
        yield
    except BaseException as error:
        if made and not had_checkpoint and newest_checkpoint(out_dir) is None:
            (out_dir / cfg.CFG_DEST).unlink(missing_ok=True)
            if is_user_error(error):
                (out_dir / LOG_NAME).unlink(missing_ok=True)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
