"""Checkpoints of a run: OUT_DIR/checkpoints/model_epoch_0001.pyth, in the published layout."""

import re
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from core.environment import atomic_write
from model.weights import load_strict, normalise_names, read_checkpoint

FOLDER = "checkpoints"
# Settings that change what a network computes without changing a shape: a file's own `cfg` tells them.
UNSEEN_IN_SHAPES = ("RESNET.STRIDE_1X1", "BN.EPS")
CONTENT = {"epoch": int, "model_state": dict, "optimizer_state": dict}
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


def check_saved_settings(text: object, cfg: CfgNode, path: Path) -> None:
    """Hold `cfg` against a weight file's own configuration, in what the shapes of its weights do not show.

    Raises `ValueError` naming the file and the key to set. A file without a configuration, or with one that is not
    YAML, cannot be checked.
    """
    try:
        saved = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        return
    for key in UNSEEN_IN_SHAPES:
        section, name = key.split(".")
        settings = saved.get(section) if isinstance(saved, dict) else None
        there = settings.get(name) if isinstance(settings, dict) else None
        here = cfg[section][name]
        if isinstance(there, type(here)) and there != here:  # anything else is not a value of this key
            raise ValueError(f"{path}: trained with {key} {there}, here it is {here}: set {key} {there}")


def resume(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore weights and momentum exactly; return the number of epochs done. Raises `ValueError` naming the file.

    Rates, decay and the like stay those of the configuration, which may have been changed since.
    """
    content = read_checkpoint(path)
    absent = [key for key, kind in CONTENT.items() if not isinstance(content.get(key), kind)]
    if absent:
        raise ValueError(f"{path}: no checkpoint of a training run, it lacks {', '.join(absent)}")
    state = normalise_names(content, source=str(path))
    load_strict(model, state, source=str(path))
    own = [name for name, _ in model.named_parameters()]
    if [name for name in state if name in set(own)] != own:  # the optimiser numbers them
        raise ValueError(f"{path}: its parameters stand in another order; start from it with TRAIN.WEIGHTS instead")
    configured = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content["optimizer_state"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit this configuration ({error})") from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    return content["epoch"] + 1
