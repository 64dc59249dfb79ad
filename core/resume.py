"""The whole state of a run as one dictionary of plain values, and back: what makes resuming exact."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from core.distributed import gather_objects, is_main, world_size
from core.environment import code_version
from core.position import Position
from core.saved_settings import changed_settings, check_saved_settings
from model.weights import CLASS_MATRIX, load_strict, normalise_names, read_checkpoint

CONTENT = {"epoch": int, "model_state": dict, "optimizer_state": dict}
# Where the data lie, and what else may differ between two sittings of one run without a word.
UNREMARKABLE = ("OUT_DIR", "CFG_DEST", "LOG_", "HOST", "PORT", "DIST_", "DOWNLOAD_CACHE", "INFER.", "TEST.WEIGHTS")


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
        "optimizer_state": _whole_optimizer(model, optimizer),
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


def _head(model: nn.Module) -> nn.Module | None:
    """The head, whose classes may be split over the processes."""
    return getattr(model, "desc_cls", None)


def _whole_model(model: nn.Module) -> dict[str, Tensor]:
    state, head = dict(model.state_dict()), _head(model)
    if head is not None:
        state[CLASS_MATRIX] = head.gather(state[CLASS_MATRIX])
    return state


def _whole_optimizer(model: nn.Module, optimizer: Optimizer) -> dict:
    content, head = optimizer.state_dict(), _head(model)
    if head is not None:
        entry = content["state"].get(_number_of(optimizer, head.weight), {})
        for name, value in sorted(entry.items()):
            if isinstance(value, Tensor) and value.shape == head.weight.shape:
                entry[name] = head.gather(value)
    return content


def _number_of(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Under which number an optimiser keeps a parameter's state."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    return next(number for number, p in enumerate(everything) if p is parameter)


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
) -> list[str]:
    """Restore everything that `state_of` saved; return notes about what has changed since.

    Momentum, decay and the like stay those of the configuration. Raises `ValueError` naming the file and the difference
    for another architecture, class count or list; nothing is then half restored that a run would go on with.
    """
    content = read_checkpoint(path)
    absent = [key for key, kind in CONTENT.items() if not isinstance(content.get(key), kind)]
    if absent:
        raise ValueError(f"{path}: no checkpoint of a training run, it lacks {', '.join(absent)}")
    run = content.get("run") if isinstance(content.get("run"), dict) else {}
    _check_lists(run.get("lists"), lists or {}, path)
    _load_model(model, content, path)
    notes = check_saved_settings(content.get("cfg"), cfg, path)
    _load_optimizer(model, optimizer, content["optimizer_state"], path)
    if average is not None and "ema_state" in content and run:  # that of another code may be as it was at the start
        _load_model(average, {"model_state": content["ema_state"]}, path)
    elif average is not None:
        average.load_state_dict(model.state_dict())
        notes.append(f"{path} holds no moving average of ours: it starts from the weights")
    if scaler is not None and run.get("scaler"):
        scaler.load_state_dict(run["scaler"])
    position.epochs_done, position.iteration = content["epoch"] + 1, content.get("iteration", 0)
    position.restore(run)
    notes += _place_in_epoch(cfg, run, position)
    notes += _split_of_batch(cfg, run)
    changed = [c for c in changed_settings(content.get("cfg"), cfg) if not c[0].startswith(UNREMARKABLE)]
    if changed:
        listed = ", ".join(f"{key} {there} -> {here}" for key, there, here in changed)
        notes.append(f"settings changed since {path.name} was written: {listed}")
    return notes


def _check_lists(saved: object, lists: dict[str, str], path: Path) -> None:
    for name, digest in lists.items():
        there = saved.get(name) if isinstance(saved, dict) else None
        if there is not None and there != digest:
            raise ValueError(
                f"{path}: trained with another {name} list (sha256 {there[:8]}, here {digest[:8]}): restore that list, "
                "or start anew from these weights with TRAIN.WEIGHTS and another OUT_DIR"
            )


def _load_model(model: nn.Module, content: dict, path: Path) -> None:
    state = normalise_names(content, source=str(path))
    head = _head(model)
    if head is not None and CLASS_MATRIX in state:
        classes = len(state[CLASS_MATRIX])
        if classes != head.num_classes:
            raise ValueError(f"{path}: its head has {classes} classes, MODEL.NUM_CLASSES is {head.num_classes}")
    load_strict(model, state, source=str(path))
    own = [name for name, _ in model.named_parameters()]
    if [name for name in state if name in set(own)] != own:  # the optimiser numbers them
        raise ValueError(f"{path}: its parameters stand in another order; start from it with TRAIN.WEIGHTS instead")


def _load_optimizer(model: nn.Module, optimizer: Optimizer, content: dict, path: Path) -> None:
    # The rate is set before every step; the saved one shows which was the last.
    configured = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    head = _head(model)
    try:
        for number, entry in content["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.dim():
                    if head is not None and parameters[number] is head.weight:
                        value = entry[name] = head.shard(value)
                    if value.shape != parameters[number].shape:
                        raise KeyError(f"{name} of parameter {number} is {list(value.shape)}")
        optimizer.load_state_dict(content)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its optimizer state does not fit this configuration ({reason})") from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


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
