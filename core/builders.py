"""The one place where a configuration becomes model, data and optimiser."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from yacs.config import CfgNode

from core.base.download import local_path
from core.base.errors import UserError
from core.base.files import sha256_file
from core.checkpoints.checkpoint import newest_checkpoint
from core.checkpoints.saved_settings import check_saved_settings, network_settings, read_saved
from core.config_values import find
from core.optimizer import Frozen, build_adamw, build_sgd, parameter_groups
from core.processes.distributed import rank, world_size
from core.schedule import learning_rate
from core.step import TrainStep
from datasets.device import DeviceBatches
from datasets.landmark import LandmarkDataset
from datasets.loader import ImageLoader, TestBatches, TrainBatches, make_loader
from datasets.transforms import FastTrainTransform, TestTransform, TrainTransform
from model.backbones import BACKBONES
from model.classifier import Classifier
from model.dolg import DOLG
from model.margin import build_head
from model.weights.loading import better_state, load_initial, load_strict, normalise_names, read_checkpoint

B = TypeVar("B", TrainBatches, TestBatches)
# Its name changed in torch 2.13.
_ddp_arguments = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ddp_arguments else "broadcast_buffers"


def _backbone(cfg: CfgNode) -> nn.Module:
    backbone = BACKBONES[cfg.MODEL.TYPE]
    return backbone.layers()(**{argument: find(cfg, key) for argument, key in backbone.settings.items()})


def _descriptor_settings(cfg: CfgNode) -> dict:
    return {
        "dim": cfg.MODEL.HEADS.REDUCTION_DIM,
        "with_ma": cfg.MODEL.WITH_MA,
        "fusion": cfg.MODEL.FUSION,
        "gem_p": cfg.MODEL.GEM.P,
        "gem_trainable": cfg.MODEL.GEM.TRAINABLE,
        "bn_eps": cfg.BN.EPS,
        "bn_momentum": cfg.BN.MOM,
    }


def build_descriptor(cfg: CfgNode) -> DOLG:
    """The network that extraction uses, without a classification head."""
    return DOLG(_backbone(cfg), **_descriptor_settings(cfg))


def build_classifier(cfg: CfgNode) -> Classifier:
    """The network that is trained."""
    head = build_head(
        cfg.MODEL.HEADS.CLS_LAYER,
        cfg.MODEL.HEADS.REDUCTION_DIM,
        cfg.MODEL.NUM_CLASSES,
        scale=cfg.MODEL.HEADS.SCALE,
        margin=cfg.MODEL.HEADS.MARGIN,
        sharded=(rank(), world_size()) if cfg.MODEL.HEADS.SHARDED else (0, 1),
    )
    model = Classifier(_backbone(cfg), head, **_descriptor_settings(cfg))
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.BN.SYNC and world_size() > 1 else model


def load_initial_weights(cfg: CfgNode, model: Classifier) -> list[str]:
    """Load TRAIN.WEIGHTS, a file or an address; return the notes of the load."""
    path = local_path(cfg.TRAIN.WEIGHTS, Path(cfg.DOWNLOAD_CACHE).expanduser())
    return _load_weights(cfg, model, path, load_initial)


def tested_weights(cfg: CfgNode) -> Path:
    """The file to extract with: TEST.WEIGHTS, or the newest checkpoint in OUT_DIR."""
    if cfg.TEST.WEIGHTS:
        return local_path(cfg.TEST.WEIGHTS, Path(cfg.DOWNLOAD_CACHE).expanduser())
    newest, notes = newest_checkpoint(cfg.OUT_DIR)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if newest is None:
        raise UserError(f"no weights: set TEST.WEIGHTS, or train first (no checkpoint in {cfg.OUT_DIR}/checkpoints)")
    return newest


def load_tested_weights(cfg: CfgNode, model: DOLG) -> tuple[Path, list[str]]:
    """Load `tested_weights` strictly; return the file and the notes of the load."""
    path = tested_weights(cfg)
    return path, _load_weights(cfg, model, path, load_strict)


def _load_weights(cfg: CfgNode, model: DOLG, path: Path, load: Callable[..., list[str]]) -> list[str]:
    content, note = better_state(read_checkpoint(path), source=str(path))
    network_settings(read_saved(content.get("cfg"))[0], source=str(path))  # names another family of networks
    notes = [note] if note else []
    notes += load(model, normalise_names(content, source=str(path)), source=str(path))
    # After the load, which says more of another architecture.
    return notes + check_saved_settings(content.get("cfg"), cfg, path)


def build_train_loader(cfg: CfgNode) -> ImageLoader[LandmarkDataset, TrainBatches]:
    """This process's share of TRAIN.DATASET's batches."""
    transform = FastTrainTransform if cfg.DATA_LOADER.MODE == "fast" else TrainTransform
    root = Path(cfg.DATA_LOADER.DATA_DIR) / cfg.TRAIN.DATASET
    dataset = LandmarkDataset(
        root,
        root / cfg.TRAIN.SPLIT,
        transform=transform(cfg.TRAIN.IM_SIZE),
        num_classes=cfg.MODEL.NUM_CLASSES,
        seed=cfg.RNG_SEED,
        skip_broken=cfg.DATA_LOADER.SKIP_BROKEN > 0,
    )
    batches = TrainBatches(
        len(dataset),
        batch_size=cfg.TRAIN.BATCH_SIZE,
        seed=cfg.RNG_SEED,
        rank=rank(),
        world=world_size(),
        sampling=cfg.TRAIN.SAMPLING,
        labels=dataset.labels,
    )
    return _loader(cfg, dataset, batches)


def build_test_loader(cfg: CfgNode) -> ImageLoader[LandmarkDataset, TestBatches] | None:
    """This process's share of the validation list, None if TEST.SPLIT is empty."""
    if not cfg.TEST.SPLIT:
        return None
    root = Path(cfg.DATA_LOADER.DATA_DIR) / cfg.TEST.DATASET
    dataset = LandmarkDataset(
        root,
        root / cfg.TEST.SPLIT,
        transform=TestTransform(cfg.TEST.IM_SIZE, cfg.TRAIN.IM_SIZE),
        num_classes=cfg.MODEL.NUM_CLASSES,
        seed=cfg.RNG_SEED,
        skip_broken=cfg.DATA_LOADER.SKIP_BROKEN > 0,
    )
    batches = TestBatches(len(dataset), batch_size=cfg.TEST.BATCH_SIZE, rank=rank(), world=world_size())
    return _loader(cfg, dataset, batches)


def _loader(cfg: CfgNode, dataset: LandmarkDataset, batches: B) -> ImageLoader[LandmarkDataset, B]:
    pin_memory = cfg.DATA_LOADER.PIN_MEMORY and cfg.NUM_GPUS > 0
    workers, timeout = cfg.DATA_LOADER.NUM_WORKERS, cfg.DATA_LOADER.TIMEOUT
    return make_loader(dataset, batches, workers=workers, pin_memory=pin_memory, timeout=timeout)


def batches_on_device(loader: ImageLoader, device: torch.device) -> DeviceBatches:
    """The loader's batches as the network takes them, on the device."""
    return DeviceBatches(loader, device)


def list_hashes(cfg: CfgNode) -> dict[str, str]:
    """sha256 of the lists that are trained and validated with."""
    named = {"training": cfg.TRAIN, "validation": cfg.TEST}
    root = Path(cfg.DATA_LOADER.DATA_DIR)
    return {name: sha256_file(root / part.DATASET / part.SPLIT) for name, part in named.items() if part.SPLIT}


def freeze(cfg: CfgNode, model: DOLG) -> Frozen:
    """Hold the parts of the backbone still that are not to be trained."""
    stages = BACKBONES[cfg.MODEL.TYPE].stages[: cfg.TRAIN.FREEZE_AT]
    return Frozen(model.globalmodel, stages=stages, batch_norm=cfg.TRAIN.FREEZE_BN)


def _parameter_groups(cfg: CfgNode, model: Classifier) -> list[dict]:
    return parameter_groups(
        model,
        bn_weight_decay=cfg.BN.CUSTOM_WEIGHT_DECAY if cfg.BN.USE_CUSTOM_WEIGHT_DECAY else None,
        head=model.desc_cls,
        head_lr_mult=cfg.OPTIM.HEAD_LR_MULT,
    )


def trained_parameters(cfg: CfgNode) -> list[list[str]]:
    """The names of the parameters that are trained, in the groups and the order in which an optimizer numbers them."""
    with torch.device("meta"):
        model = build_classifier(cfg)
    freeze(cfg, model)
    return [[name for name, _ in group["params"]] for group in _parameter_groups(cfg, model)]


def build_optimizer(cfg: CfgNode, model: Classifier) -> Optimizer:
    groups = _parameter_groups(cfg, model)
    common = {"lr": cfg.OPTIM.BASE_LR, "weight_decay": cfg.OPTIM.WEIGHT_DECAY}
    if cfg.OPTIM.OPTIMIZER == "adamw":
        return build_adamw(groups, betas=cfg.OPTIM.BETAS, **common)
    return build_sgd(
        groups,
        momentum=cfg.OPTIM.MOMENTUM,
        dampening=cfg.OPTIM.DAMPENING,
        nesterov=cfg.OPTIM.NESTEROV,
        **common,
    )


def build_step(cfg: CfgNode, model: Classifier, optimizer: Optimizer) -> TrainStep:
    """One update, over all processes of the run."""
    network: nn.Module = model
    sharded = cfg.MODEL.HEADS.SHARDED and world_size() > 1
    if world_size() > 1:
        if sharded:  # every process has other rows of this one: nothing to average
            vars(network)["_ddp_params_and_buffers_to_ignore"] = ["desc_cls.weight"]
        # Running statistics of the others are never used: what is evaluated is set by the first process.
        unsynchronised: dict[str, Any] = {_SYNC_BUFFERS: False}
        device = next(model.parameters()).device
        network = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            **unsynchronised,
            gradient_as_bucket_view=True,
            static_graph=cfg.TRAIN.ACCUM_STEPS == 1 and not cfg.TRAIN.COMPILE,
        )
    if cfg.TRAIN.COMPILE:
        network = cast(nn.Module, torch.compile(network))
    return TrainStep(
        network,
        optimizer,
        precision=cfg.TRAIN.PRECISION,
        accumulate=cfg.TRAIN.ACCUM_STEPS,
        clip=cfg.OPTIM.CLIP_GRAD,
        sharded=[model.desc_cls.weight] if sharded else [],
    )


def learning_rate_at(cfg: CfgNode, epoch: int, part: float = 0.0) -> float:
    """The rate in an epoch (zero-based) when `part` (0 to below 1) of it is done."""
    return learning_rate(
        epoch + part if cfg.OPTIM.LR_PER_ITER else epoch,
        policy=cfg.OPTIM.LR_POLICY,
        base_lr=cfg.OPTIM.BASE_LR,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        steps=cfg.OPTIM.STEPS,
        lr_mult=cfg.OPTIM.LR_MULT,
        gamma=cfg.OPTIM.GAMMA,
        warmup_epochs=cfg.OPTIM.WARMUP_EPOCHS,
        warmup_factor=cfg.OPTIM.WARMUP_FACTOR,
    )
