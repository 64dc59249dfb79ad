"""Settings that cannot work, or contradict each other, are refused before anything starts."""

import math
import os
from collections.abc import Collection, Iterator

from yacs.config import CfgNode

from core.config_values import ConfigError, find
from model.backbones import BACKBONES

CHOICES = {
    "MODEL.FUSION": ("orthogonal", "global"),
    "MODEL.HEADS.CLS_LAYER": ("arcface", "curricularface", "cosine"),
    "MODEL.LOSSES.NAME": ("cross_entropy",),
    "OPTIM.OPTIMIZER": ("sgd", "adamw"),
    "OPTIM.LR_POLICY": ("cos", "steps", "exp"),
    "TRAIN.PRECISION": ("fp32", "tf32", "bf16", "fp16"),
    "TRAIN.SAMPLING": ("uniform", "class_balanced"),
    "DATA_LOADER.MODE": ("exact", "fast"),
    "INFER.PRECISION": ("fp32", "bf16", "fp16"),
    "INFER.DTYPE": ("float32", "float16"),
    "LOG_DEST": ("both", "stdout", "file"),
    "DIST_BACKEND": ("nccl", "gloo"),
}
EXPORTS = ("mat", "npz")
AT_LEAST_ONE = (
    "MODEL.NUM_CLASSES",
    "MODEL.HEADS.REDUCTION_DIM",
    "RESNET.NUM_GROUPS",
    "RESNET.WIDTH_PER_GROUP",
    "BN.NUM_SAMPLES_PRECISE",
    "TRAIN.BATCH_SIZE",
    "TRAIN.EVAL_PERIOD",
    "TRAIN.CHECKPOINT_PERIOD",
    "TRAIN.ACCUM_STEPS",
    "TEST.BATCH_SIZE",
    "LOG_PERIOD",
    "DIST_TIMEOUT",
    "INFER.TOTAL_NUM",
    "INFER.CHUNK_SIZE",
    "INFER.THREADS",
    "INFER.MIN_SIDE",
    "INFER.MAX_ASPECT",
    "INFER.MAX_PIXELS",
    "INFER.MAX_LEVEL_PIXELS",
)
NOT_NEGATIVE = (
    "OPTIM.BASE_LR",
    "OPTIM.MAX_EPOCH",
    "OPTIM.MOMENTUM",
    "OPTIM.DAMPENING",
    "OPTIM.WEIGHT_DECAY",
    "OPTIM.WARMUP_EPOCHS",
    "OPTIM.CLIP_GRAD",
    "TRAIN.CHECKPOINT_ITERS",
    "TRAIN.KEEP_CHECKPOINTS",
    "DATA_LOADER.SKIP_BROKEN",
    "INFER.SKIP_BROKEN",
    "SCORE.DBA",
    "SCORE.DBA_ALPHA",
    "SCORE.QE",
    "SCORE.QE_ALPHA",
    "SCORE.RERANK",
    "SCORE.RERANK_NEIGHBOURS",
    "SCORE.RERANK_BETA",
    "INFER.BATCH_SIZE",
    "BN.CUSTOM_WEIGHT_DECAY",
    "MODEL.HEADS.MARGIN",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.TIMEOUT",
    "NUM_GPUS",
    "RNG_SEED",
)
POSITIVE = (
    "MODEL.GEM.P",
    "MODEL.HEADS.SCALE",
    "BN.EPS",
    "OPTIM.GAMMA",
    "OPTIM.LR_MULT",
    "OPTIM.HEAD_LR_MULT",
    "OPTIM.WARMUP_FACTOR",
)
# f4 has stride 32: a smaller crop leaves less than one position of it.
MIN_IM_SIZE = 32


def check(cfg: CfgNode) -> None:
    """Raise `ConfigError` naming the key and the mend for the first setting that cannot work."""
    for key, choices in _choices(cfg):
        if find(cfg, key) not in choices:
            raise ConfigError(f"{key} {find(cfg, key)} is not one of: {', '.join(map(str, choices))}")
    for keys, low, words in ((AT_LEAST_ONE, 1, "at least 1"), (NOT_NEGATIVE, 0, "0 or more")):
        for key in keys:
            if not low <= find(cfg, key) < math.inf:
                raise ConfigError(f"{key} is {find(cfg, key)}, it must be {words}")
    for key in POSITIVE:
        if not 0 < find(cfg, key) < math.inf:
            raise ConfigError(f"{key} is {find(cfg, key)}, it must be above 0")
    if cfg.SEARCH.URI and cfg.SEARCH.INDEX:
        raise ConfigError("SEARCH.INDEX and SEARCH.URI are two ways to search, faiss and Milvus; leave one empty")
    if not 0 <= cfg.BN.MOM <= 1:
        raise ConfigError(f"BN.MOM is {cfg.BN.MOM}, it must be 0 to 1")
    if not cfg.OUT_DIR:
        raise ConfigError("OUT_DIR is empty, name the folder for this run's output")
    if not 0 <= cfg.PORT < 65536:
        raise ConfigError(f"PORT is {cfg.PORT}, it must be 1 to 65535, or 0 for a free one")
    _check_model(cfg)
    _check_training(cfg)
    _check_extraction(cfg)


def _choices(cfg: CfgNode) -> Iterator[tuple[str, Collection]]:
    yield from CHOICES.items()
    yield "MODEL.TYPE", BACKBONES
    backbone = BACKBONES[cfg.MODEL.TYPE]
    yield "MODEL.DEPTH", backbone.sizes
    yield "TRAIN.FREEZE_AT", range(len(backbone.stages) + 1)


def derived(cfg: CfgNode) -> dict[str, int | str]:
    """The settings that backbone and fusion decide."""
    size = BACKBONES[cfg.MODEL.TYPE].sizes[cfg.MODEL.DEPTH]
    in_feat = 2 * size.f3 if cfg.MODEL.FUSION == "orthogonal" else size.f4
    return {"MODEL.S3_DIM": size.f3, "MODEL.S4_DIM": size.f4, "MODEL.HEADS.IN_FEAT": in_feat, **size.implied}


def _check_model(cfg: CfgNode) -> None:
    for key, needed in derived(cfg).items():
        value, not_given = find(cfg, key), type(needed)()
        if value not in (needed, not_given):
            raise ConfigError(
                f"{key} {value} does not fit: a {BACKBONES[cfg.MODEL.TYPE].title} of MODEL.DEPTH {cfg.MODEL.DEPTH} "
                f"with MODEL.FUSION {cfg.MODEL.FUSION} has {needed}; leave the key out"
            )
    if cfg.MODEL.FUSION == "global" and cfg.MODEL.WITH_MA:
        raise ConfigError("MODEL.FUSION global has no local branch: set MODEL.WITH_MA False")
    if not cfg.MODEL.HEADS.MARGIN < math.pi / 2:
        raise ConfigError(f"MODEL.HEADS.MARGIN {cfg.MODEL.HEADS.MARGIN} is in radians and must be below pi/2")


def _check_training(cfg: CfgNode) -> None:
    if cfg.TRAIN.IM_SIZE < MIN_IM_SIZE:
        raise ConfigError(f"TRAIN.IM_SIZE is {cfg.TRAIN.IM_SIZE}, the network needs at least {MIN_IM_SIZE} pixels")
    if cfg.TEST.IM_SIZE < cfg.TRAIN.IM_SIZE:
        raise ConfigError(
            f"TEST.IM_SIZE {cfg.TEST.IM_SIZE} is below TRAIN.IM_SIZE {cfg.TRAIN.IM_SIZE}: "
            "the centre crop would not fit, raise TEST.IM_SIZE"
        )
    if cfg.MODEL.HEADS.SHARDED and cfg.TRAIN.PRECISION == "fp16":
        raise ConfigError("MODEL.HEADS.SHARDED does not go with TRAIN.PRECISION fp16: use bf16")
    if not os.environ.get("WORLD_SIZE"):  # else their number is not NUM_GPUS
        check_split(cfg, max(cfg.NUM_GPUS, 1))
    if cfg.BN.SYNC and not cfg.NUM_GPUS:
        raise ConfigError("BN.SYNC works on GPUs only: set it False, or NUM_GPUS above 0")
    if len(set(cfg.TEST.RETRIEVAL)) != len(cfg.TEST.RETRIEVAL):
        raise ConfigError(f"TEST.RETRIEVAL {cfg.TEST.RETRIEVAL} names a set twice")
    _check_optimizer(cfg)


def check_split(cfg: CfgNode, processes: int) -> None:
    """Raise `ConfigError` if a batch cannot be split over so many processes, and ACCUM_STEPS parts in each."""
    batch, parts = cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUM_STEPS
    if batch % processes:
        who = f"NUM_GPUS {cfg.NUM_GPUS}" if processes == cfg.NUM_GPUS else f"the run's {processes} processes"
        raise ConfigError(f"TRAIN.BATCH_SIZE {batch} does not divide by {who}")
    share = batch // processes
    if share % parts:
        raise ConfigError(f"TRAIN.ACCUM_STEPS {parts} does not divide a process's share of the batch, {share} images")
    seen = processes if cfg.BN.SYNC else 1  # by a batch norm: parts of one process, or of all
    # The last batch of an epoch is left out where it is not full, so that all parts have this size.
    if share // parts * seen == 1 and cfg.TRAIN.IM_SIZE <= MIN_IM_SIZE and _trains_batch_norm_of_f4(cfg):
        raise ConfigError(
            f"TRAIN.BATCH_SIZE {batch} over {processes} processes and TRAIN.ACCUM_STEPS {parts} gives batch norm one "
            f"image at a time, and TRAIN.IM_SIZE {cfg.TRAIN.IM_SIZE} one position of f4: it needs more than one value, "
            "raise BATCH_SIZE or IM_SIZE"
        )


def _trains_batch_norm_of_f4(cfg: CfgNode) -> bool:
    return not cfg.TRAIN.FREEZE_BN and cfg.TRAIN.FREEZE_AT < len(BACKBONES[cfg.MODEL.TYPE].stages)


def _check_optimizer(cfg: CfgNode) -> None:
    steps = cfg.OPTIM.STEPS
    if cfg.OPTIM.LR_POLICY == "steps" and (not steps or steps[0] != 0 or steps != sorted(set(steps))):
        raise ConfigError(f"OPTIM.STEPS {steps} must be ascending epochs that begin with 0")
    if not 0 <= cfg.OPTIM.EMA_DECAY < 1:
        raise ConfigError(f"OPTIM.EMA_DECAY is {cfg.OPTIM.EMA_DECAY}, it must be from 0 to below 1")
    if len(cfg.OPTIM.BETAS) != 2 or not all(0 <= beta < 1 for beta in cfg.OPTIM.BETAS):
        raise ConfigError(f"OPTIM.BETAS {cfg.OPTIM.BETAS} must be two numbers from 0 to below 1")
    if cfg.OPTIM.NESTEROV and cfg.OPTIM.OPTIMIZER == "sgd" and (cfg.OPTIM.MOMENTUM == 0 or cfg.OPTIM.DAMPENING != 0):
        raise ConfigError("OPTIM.NESTEROV needs OPTIM.MOMENTUM above 0 and OPTIM.DAMPENING 0")


def _check_extraction(cfg: CfgNode) -> None:
    cut, total = cfg.INFER.CUT_NUM, cfg.INFER.TOTAL_NUM
    if not 1 <= cut <= total:
        raise ConfigError(f"INFER.CUT_NUM is {cut}, it must be 1 to INFER.TOTAL_NUM ({total})")
    if not cfg.INFER.SCALES or not all(0 < scale < math.inf for scale in cfg.INFER.SCALES):
        raise ConfigError(f"INFER.SCALES {cfg.INFER.SCALES} must be numbers above 0")
    if len(set(cfg.INFER.DATASETS)) != len(cfg.INFER.DATASETS):
        raise ConfigError(f"INFER.DATASETS {cfg.INFER.DATASETS} names a set twice")
    if cfg.INFER.NUM_WORKERS < -1:
        raise ConfigError(f"INFER.NUM_WORKERS is {cfg.INFER.NUM_WORKERS}, it must be 0 or more, or -1")
    if not set(cfg.INFER.EXPORT) <= set(EXPORTS):
        raise ConfigError(f"INFER.EXPORT {cfg.INFER.EXPORT} must be some of: {', '.join(EXPORTS)}")
