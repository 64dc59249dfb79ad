"""The one place where a configuration becomes model, data and optimiser."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.optim import SGD
from yacs.config import CfgNode

from core.checkpoint import check_saved_settings, newest_checkpoint
from core.distributed import rank, world_size
from core.download import local_path
from core.optimizer import build_sgd
from core.schedule import learning_rate
from datasets.landmark import LandmarkDataset
from datasets.loader import ImageLoader, TestBatches, TrainBatches, make_loader
from datasets.transforms import TestTransform, TrainTransform
from model.classifier import Classifier
from model.dolg import DOLG
from model.margin import build_head
from model.resnet import ResNet
from model.weights import load_initial, load_strict, normalise_names, read_checkpoint


def _backbone(cfg: CfgNode) -> ResNet:
    return ResNet(
        cfg.MODEL.DEPTH,
        groups=cfg.RESNET.NUM_GROUPS,
        width_per_group=cfg.RESNET.WIDTH_PER_GROUP,
        stride_1x1=cfg.RESNET.STRIDE_1X1,
        bn_eps=cfg.BN.EPS,
        bn_momentum=cfg.BN.MOM,
        zero_init_final_gamma=cfg.BN.ZERO_INIT_FINAL_GAMMA,
        relu_inplace=cfg.MEM.RELU_INPLACE,
    )


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
    )
    return Classifier(_backbone(cfg), head, **_descriptor_settings(cfg))


def load_initial_weights(cfg: CfgNode, model: Classifier) -> list[str]:
    """Load TRAIN.WEIGHTS, a file or an address; return the notes of the load."""
    path = local_path(cfg.TRAIN.WEIGHTS, Path(cfg.DOWNLOAD_CACHE).expanduser())
    return _load_weights(cfg, model, path, load_initial)


def tested_weights(cfg: CfgNode) -> Path:
    """The file to extract with: TEST.WEIGHTS, or the newest checkpoint in OUT_DIR."""
    if cfg.TEST.WEIGHTS:
        return local_path(cfg.TEST.WEIGHTS, Path(cfg.DOWNLOAD_CACHE).expanduser())
    newest = newest_checkpoint(cfg.OUT_DIR)
    if newest is None:
        raise ValueError(f"no weights: set TEST.WEIGHTS, or train first (no checkpoint in {cfg.OUT_DIR}/checkpoints)")
    return newest


def load_tested_weights(cfg: CfgNode, model: DOLG) -> tuple[Path, list[str]]:
    """Load `tested_weights` strictly; return the file and the notes of the load."""
    path = tested_weights(cfg)
    return path, _load_weights(cfg, model, path, load_strict)


def _load_weights(cfg: CfgNode, model: DOLG, path: Path, load: Callable[..., list[str]]) -> list[str]:
    content = read_checkpoint(path)
    notes = load(model, normalise_names(content, source=str(path)), source=str(path))
    check_saved_settings(content.get("cfg"), cfg, path)  # after the load, which says more of another architecture
    return notes


def build_train_loader(cfg: CfgNode) -> ImageLoader:
    """This process's share of TRAIN.DATASET's batches."""
    root = Path(cfg.DATA_LOADER.DATA_DIR) / cfg.TRAIN.DATASET
    dataset = LandmarkDataset(
        root,
        root / cfg.TRAIN.SPLIT,
        transform=TrainTransform(cfg.TRAIN.IM_SIZE),
        num_classes=cfg.MODEL.NUM_CLASSES,
        seed=cfg.RNG_SEED,
    )
    batches = TrainBatches(
        len(dataset), batch_size=cfg.TRAIN.BATCH_SIZE, seed=cfg.RNG_SEED, rank=rank(), world=world_size()
    )
    return _loader(cfg, dataset, batches)


def build_test_loader(cfg: CfgNode) -> ImageLoader | None:
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
    )
    batches = TestBatches(len(dataset), batch_size=cfg.TEST.BATCH_SIZE, rank=rank(), world=world_size())
    return _loader(cfg, dataset, batches)


def _loader(cfg: CfgNode, dataset: LandmarkDataset, batches: TrainBatches | TestBatches) -> ImageLoader:
    pin_memory = cfg.DATA_LOADER.PIN_MEMORY and cfg.NUM_GPUS > 0
    return make_loader(dataset, batches, workers=cfg.DATA_LOADER.NUM_WORKERS, pin_memory=pin_memory)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> SGD:
    return build_sgd(
        model,
        lr=cfg.OPTIM.BASE_LR,
        momentum=cfg.OPTIM.MOMENTUM,
        dampening=cfg.OPTIM.DAMPENING,
        nesterov=cfg.OPTIM.NESTEROV,
        weight_decay=cfg.OPTIM.WEIGHT_DECAY,
        bn_weight_decay=cfg.BN.CUSTOM_WEIGHT_DECAY if cfg.BN.USE_CUSTOM_WEIGHT_DECAY else None,
    )


def learning_rate_at(cfg: CfgNode, epoch: int) -> float:
    """The rate of a whole epoch (zero-based)."""
    return learning_rate(
        epoch,
        policy=cfg.OPTIM.LR_POLICY,
        base_lr=cfg.OPTIM.BASE_LR,
        max_epoch=cfg.OPTIM.MAX_EPOCH,
        steps=cfg.OPTIM.STEPS,
        lr_mult=cfg.OPTIM.LR_MULT,
        gamma=cfg.OPTIM.GAMMA,
        warmup_epochs=cfg.OPTIM.WARMUP_EPOCHS,
        warmup_factor=cfg.OPTIM.WARMUP_FACTOR,
    )
