"""Checkpoint files: OUT_DIR/checkpoints/model_epoch_0001.pyth, written whole, verified, and the newest of them."""

import contextlib
import os
import re
from pathlib import Path

import torch

from core.base.errors import UserError
from core.base.files import atomic_write
from model.weights.loading import WeightsError, read_checkpoint

FOLDER = "checkpoints"
BEST = "model_best.pyth"
PATTERN = re.compile(r"model_epoch_(\d{4,})(?:_iter_(\d{6,}))?\.pyth")
KEPT_INSIDE_EPOCHS = 2  # where all that end an epoch are kept: one more than needed, should the newest be damaged


def checkpoint_path(out_dir: str | Path, epochs_done: int, iteration: int = 0) -> Path:
    """The file of a position: so many epochs done, and so many iterations of the next."""
    inside = f"_iter_{iteration:06d}" if iteration else ""
    return Path(out_dir) / FOLDER / f"model_epoch_{epochs_done:04d}{inside}.pyth"


def place_of(path: Path) -> tuple[int, int] | None:
    """The position in a file's name: epochs done, and iterations of the next. None for another kind of name."""
    match = PATTERN.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def checkpoints(out_dir: str | Path) -> list[Path]:
    """All checkpoints, the newest last (by the position in their names)."""
    files = (Path(out_dir) / FOLDER).glob("model_epoch_*.pyth")
    return sorted(filter(place_of, files), key=lambda path: place_of(path) or (0, 0))


def newest_checkpoint(out_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole (None where there is no checkpoint at all), and notes about newer ones.

    Raises `UserError` where there are checkpoints, but all are broken.
    """
    notes: list[str] = []
    for path in reversed(checkpoints(out_dir)):
        fault = find_fault(path)
        if fault is None:
            return path, notes
        notes.append(f"{path} is broken ({fault}): the one before it is used")
    if notes:
        folder = Path(out_dir) / FOLDER
        raise UserError(f"{folder}: none of the {len(notes)} checkpoints is whole: remove them to start anew")
    return None, notes


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if all that it holds is as it was written."""
    try:
        read_checkpoint(path)
    except WeightsError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def write_checkpoint(content: dict, path: Path) -> None:
    """The file appears complete, on the disk, or not at all."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def link_best(path: Path) -> None:
    """Give a checkpoint the second name model_best.pyth, under which it outlives its first."""
    best, new = path.with_name(BEST), path.with_name(f".{BEST}.tmp")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic_write(best) as file:
            for block in iter(lambda: source.read(1 << 24), b""):
                file.write(block)
        return
    os.replace(new, best)


def prune(out_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; with 0, all but the newest two of those inside an epoch."""
    present = checkpoints(out_dir)
    if keep:
        old = present[:-keep]
    else:
        inside = [path for path in present if (match := PATTERN.fullmatch(path.name)) and match[2]]
        old = [path for path in inside if path not in present[-KEPT_INSIDE_EPOCHS:]]
    for path in old:
        path.unlink()


def remove_unfinished(out_dir: str | Path) -> None:
    """Remove what a process that was killed in the middle of writing left behind. Only for the holder of the lock."""
    for path in (Path(out_dir) / FOLDER).glob(".model_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
