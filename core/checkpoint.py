"""Checkpoints of a run: OUT_DIR/checkpoints/model_epoch_0001.pyth, in the published layout."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from core.environment import atomic_write
from model.weights import load_strict, normalise_names, read_checkpoint

FOLDER = "checkpoints"
PATTERN = re.compile(r"model_epoch_(\d{4,})\.pyth")


def checkpoint_path(out_dir: str | Path, epochs_done: int) -> Path:
    return Path(out_dir) / FOLDER / f"model_epoch_{epochs_done:04d}.pyth"


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint with the most epochs done, None where there is none."""
    folder = Path(out_dir) / FOLDER
    found = [(int(match[1]), path) for path in folder.glob("*.pyth") if (match := PATTERN.fullmatch(path.name))]
    return max(found)[1] if found else None


def save_checkpoint(cfg: CfgNode, model: nn.Module, optimizer: Optimizer, *, epochs_done: int) -> Path:
    """Write `epoch` (zero-based number of the last finished one), `model_state`, `optimizer_state` and `cfg` (YAML).

    The file appears complete or not at all.
    """
    path = checkpoint_path(cfg.OUT_DIR, epochs_done)
    content = {
        "epoch": epochs_done - 1,
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "cfg": cfg.dump(),
    }
    with atomic_write(path) as file:
        torch.save(content, file)
    return path


def resume(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore model and optimiser exactly; return the number of epochs done. Raises `ValueError` naming the file."""
    content = read_checkpoint(path)
    absent = [key for key in ("epoch", "model_state", "optimizer_state") if key not in content]
    if absent:
        raise ValueError(f"{path}: no checkpoint of a training run, it lacks {', '.join(absent)}")
    load_strict(model, normalise_names(content, source=str(path)), source=str(path))
    try:
        optimizer.load_state_dict(content["optimizer_state"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit this configuration ({error})") from None
    return content["epoch"] + 1
