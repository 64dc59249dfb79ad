"""The whole state of a run as one dictionary of plain values, and back: what makes resuming exact."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from core.base.errors import UserError
from core.base.version import code_version
from core.checkpoints.optimizer_state import Head, StateError, load_state, whole_state
from core.checkpoints.position import Position
from core.checkpoints.run_content import check_content
from core.checkpoints.saved_settings import changed_settings, check_saved_settings
from core.config import get_cfg
from core.processes.distributed import gather_objects, is_main, world_size
from model.weights.loading import CLASS_MATRIX, load_strict, normalise_names, read_checkpoint

# Where the data lie, and what else may differ between two sittings of one run without a word.
UNREMARKABLE = ("OUT_DIR", "CFG_DEST", "LOG_", "HOST", "PORT", "DIST_", "DOWNLOAD_CACHE", "INFER.", "TEST.WEIGHTS")
# What only a run that begins looks at.
FOR_THE_START = ("TRAIN.WEIGHTS", "MODEL.GEM.P", "BN.ZERO_INIT_FINAL_GAMMA")
# What decides which parameters have an optimizer state, and under which number; the defaults are the published code's.
NUMBERING = (
    "BN.USE_CUSTOM_WEIGHT_DECAY",
    "OPTIM.HEAD_LR_MULT",
    "TRAIN.FREEZE_AT",
    "TRAIN.FREEZE_BN",
    "MODEL.GEM.TRAINABLE",
)


def state_of(
    cfg: CfgNode,
    model: nn.Module,
    optimizer: Optimizer,
    position: Position,
    *,
    average: nn.Module | None = None,
    scaler: dict | None = None,
    lists: dict[str, str] | None = None,
) -> dict:
    """The content of a checkpoint. A collective call; only the first process's content is complete.

    `epoch` (zero-based number of the last finished one), `model_state`, `optimizer_state` and `cfg` (YAML) as
    published; beside them `iteration` (done of the next epoch), `run`, and `ema_state` where an average is kept.
    """
    content = {
        "epoch": position.epochs_done - 1,
        "iteration": position.iteration,
        "model_state": _whole_model(model),
        "optimizer_state": whole_state(optimizer, _head(model)),
        "cfg": cfg.dump(),
        "run": {
            **position.shared(),
            "batch_size": cfg.TRAIN.BATCH_SIZE,
            "seed": cfg.RNG_SEED,
            "sums": gather_objects(position.sums()),
            "lists": dict(lists or {}),
            "scaler": scaler or {},
            "code": code_version(),
            "torch": str(torch.__version__),
        },
    }
    if average is not None:
        content["ema_state"] = _whole_model(average)
    return content


def _head(model: nn.Module) -> Head | None:
    return getattr(model, "desc_cls", None)


def _whole_model(model: nn.Module) -> dict[str, Tensor]:
    state, head = dict(model.state_dict()), _head(model)
    if head is not None:
        state[CLASS_MATRIX] = head.gather(state[CLASS_MATRIX])
    return state


def restore(
    path: Path,
    cfg: CfgNode,
    model: nn.Module,
    optimizer: Optimizer,
    position: Position,
    *,
    average: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    lists: dict[str, str] | None = None,
    numbering: Callable[[CfgNode], list[list[str]]] | None = None,
) -> list[str]:
    """Restore everything that `state_of` saved; return notes about what has changed since.

    Momentum, decay and the like stay those of the configuration. `numbering(cfg)` names the parameters that a run with
    these settings trains, group by group, for a file whose optimizer state only numbers them; without it they are
    taken for those of `optimizer`. Raises `UserError` naming the file and the difference for another architecture,
    class count or list, and for content that no run has written; nothing is then half restored that a run would go on
    with.
    """
    content = read_checkpoint(path)
    run = check_content(content, path)
    _check_lists(run.get("lists", {}), lists or {}, path)
    order = _load_model(model, content, path)
    notes = check_saved_settings(content.get("cfg"), cfg, path)

    def numbered() -> list[list[str]]:
        if order != [name for name, _ in model.named_parameters()]:
            raise StateError("it numbers the parameters, which stand in another order in model_state")
        if numbering is None:
            return [group["param_names"] for group in optimizer.param_groups]
        return numbering(_settings_of_numbers(content.get("cfg"), cfg))

    without = _load_optimizer(model, optimizer, content["optimizer_state"], path, numbered)
    if content["epoch"] >= 0 or content.get("iteration"):  # else saved before the first step, which makes the state
        notes += without
    if average is not None and "ema_state" in content and run:  # that of another code may be as it was at the start
        _load_model(average, {"model_state": content["ema_state"]}, f"{path}, ema_state")
    elif average is not None:
        average.load_state_dict(model.state_dict())
        notes.append(f"{path} holds no moving average of ours: it starts from the weights")
    if scaler is not None and run.get("scaler"):
        scaler.load_state_dict(run["scaler"])
    position.epochs_done, position.iteration = content["epoch"] + 1, content.get("iteration", 0)
    position.restore(run)
    notes += _place_in_epoch(cfg, run, position)
    notes += _split_of_batch(cfg, run)
    return notes + _changed(cfg, content.get("cfg"), position, path)


def _settings_of_numbers(text: object, cfg: CfgNode) -> CfgNode:
    """`cfg` with what decided the numbers of the parameters in a file with the configuration `text` (YAML)."""
    saved, defaults = cfg.clone(), get_cfg()
    there = {key: value for key, value, _ in changed_settings(text, defaults)}
    saved.defrost()
    for key in NUMBERING:
        default = _get(defaults, key)
        value = there.get(key, default)
        saved.merge_from_list([key, type(default)(value) if isinstance(value, int | float) else default])
    return saved


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _changed(cfg: CfgNode, text: object, position: Position, path: Path) -> list[str]:
    """Say which settings differ from those that the checkpoint was written with, and which of them have no effect."""
    changed = [c for c in changed_settings(text, cfg) if not c[0].startswith(UNREMARKABLE)]
    notes = []
    if unused := [f"{key} {here}" for key, _, here in changed if key in FOR_THE_START and here != ""]:
        notes.append(f"not used, since a run goes on: {', '.join(unused)} (name another OUT_DIR to begin with it)")
    if any(key == "TEST.RETRIEVAL" for key, *_ in changed):
        position.best_score = -math.inf
        notes.append("TEST.RETRIEVAL has changed: the best checkpoint is looked for anew")
    if used := [f"{key} {there} -> {here}" for key, there, here in changed if key not in FOR_THE_START]:
        notes.append(f"settings changed since {path.name} was written: {', '.join(used)}")
    return notes


def _check_lists(saved: dict[str, str], lists: dict[str, str], path: Path) -> None:
    for name, digest in lists.items():
        there = saved.get(name)
        if there is not None and there != digest:
            raise UserError(
                f"{path}: trained with another {name} list (sha256 {there[:8]}, here {digest[:8]}): restore that list, "
                "or start anew from these weights with TRAIN.WEIGHTS and another OUT_DIR"
            )


def _load_model(model: nn.Module, content: dict, source: Path | str) -> list[str]:
    """Load `model_state`; return the names of the parameters in its order."""
    state = normalise_names(content, source=str(source))
    head = _head(model)
    if head is not None and CLASS_MATRIX in state:
        classes = len(state[CLASS_MATRIX])
        if classes != head.num_classes:
            raise UserError(f"{source}: its head has {classes} classes, MODEL.NUM_CLASSES is {head.num_classes}")
    load_strict(model, state, source=str(source))
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name in state if name in parameters]


def _load_optimizer(
    model: nn.Module, optimizer: Optimizer, content: dict, path: Path, numbering: Callable[[], list[list[str]]]
) -> list[str]:
    try:
        return load_state(optimizer, content, _head(model), numbering=numbering)
    except StateError as error:
        raise UserError(
            f"{path}: its optimizer_state does not fit: {error}; start anew from its weights with TRAIN.WEIGHTS and "
            "another OUT_DIR"
        ) from None


def _place_in_epoch(cfg: CfgNode, run: dict, position: Position) -> list[str]:
    """Find the place inside an epoch again where the size of the batch has changed."""
    batch, seed = run.get("batch_size", cfg.TRAIN.BATCH_SIZE), run.get("seed", cfg.RNG_SEED)
    if not position.iteration:
        return []
    notes = []
    if batch != cfg.TRAIN.BATCH_SIZE:
        images = position.iteration * batch
        position.iteration = images // cfg.TRAIN.BATCH_SIZE
        again = images - position.iteration * cfg.TRAIN.BATCH_SIZE
        notes.append(
            f"TRAIN.BATCH_SIZE was {batch}: after {images} images of this epoch it goes on at iteration "
            f"{position.iteration + 1}; {again} images are seen twice"
        )
    if seed != cfg.RNG_SEED:
        notes.append(f"RNG_SEED was {seed}: the rest of this epoch stands in another order than its beginning")
    return notes


def _split_of_batch(cfg: CfgNode, run: dict) -> list[str]:
    """Say what another number of processes changes: not the order of samples."""
    before = len(run.get("sums") or [None] * world_size())
    if before == world_size() or not is_main():
        return []
    return [
        f"{before} processes before, {world_size()} now: batches hold the same images in the same order, but batch "
        f"norm sees {cfg.TRAIN.BATCH_SIZE // world_size()} of them at a time instead of "
        f"{cfg.TRAIN.BATCH_SIZE // before}, and sums are rounded in another order"
    ]
