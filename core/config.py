"""Every configuration key, its default and what it does.

The key names are those of pycls and of the published DOLG code, so old YAML files load as they are. Where a default
differs from the published one the comment says so. Paths are relative to the working directory; `~` is the home folder.
"""

import os
import sys
from pathlib import Path

from yacs.config import CfgNode

from core.config_checks import check, derived
from core.config_values import ConfigError, find, is_ignored, merge_overrides, merge_yaml, suggestion

_C = CfgNode()

# --------------------------------------------------------------------------------------------------------- model
_C.MODEL = CfgNode()
_C.MODEL.TYPE = "resnet"  # backbone family, a row of model/backbones.py
_C.MODEL.DEPTH = 50  # ResNet: 18, 34, 50, 101 or 152
_C.MODEL.NUM_CLASSES = 81313  # landmarks of the training list; GLDv2-clean has 81,313
_C.MODEL.S3_DIM = 0  # channels of f3, the input of the local branch; 0: those of the backbone, and no other value fits
_C.MODEL.S4_DIM = 0  # channels of f4, the input of the global branch; likewise
_C.MODEL.WITH_MA = False  # multi-atrous module in the local branch; the paper's model has it
_C.MODEL.FUSION = "orthogonal"  # orthogonal (DOLG) | global (GeM and fc alone, the baseline to compare with)

_C.MODEL.GEM = CfgNode()
_C.MODEL.GEM.P = 3.0  # power of the generalised mean (where training starts, if it is trained)
_C.MODEL.GEM.TRAINABLE = True  # the release trains p; the paper holds it at 3

_C.MODEL.HEADS = CfgNode()
_C.MODEL.HEADS.CLS_LAYER = "arcface"  # arcface | curricularface (the release's) | cosine; `linear` was never read
_C.MODEL.HEADS.IN_FEAT = 0  # input of fc, likewise: 2 * S3_DIM for the orthogonal fusion, S4_DIM for the global one
_C.MODEL.HEADS.REDUCTION_DIM = 512  # dimension of the descriptor
_C.MODEL.HEADS.MARGIN = 0.15  # angular margin m in radians
_C.MODEL.HEADS.SCALE = 128.0  # scale s of the logits; the paper and all our recipes use 30
_C.MODEL.HEADS.SHARDED = False  # split the classes over the processes instead of copying the head to each

_C.MODEL.LOSSES = CfgNode()
_C.MODEL.LOSSES.NAME = "cross_entropy"  # the only loss

_C.RESNET = CfgNode()
_C.RESNET.TRANS_FUN = ""  # likewise: basic_transform for depth 18 and 34, bottleneck_transform for the others
_C.RESNET.NUM_GROUPS = 1  # groups of the 3x3 convolution; more than 1 makes a ResNeXt
_C.RESNET.WIDTH_PER_GROUP = 64  # 64 for ResNet, 4 for ResNeXt 32x4d
_C.RESNET.STRIDE_1X1 = True  # stride in the 1x1 convolution; every published weight file needs False

# --------------------------------------------------------------------------------------------------- batch norm
_C.BN = CfgNode()
_C.BN.EPS = 1e-5  # added to the variance
_C.BN.MOM = 0.1  # weight of the current batch in the running average
_C.BN.USE_PRECISE_STATS = False  # recompute running statistics before validating and saving
_C.BN.NUM_SAMPLES_PRECISE = 1024  # images for that, summed over all processes
_C.BN.ZERO_INIT_FINAL_GAMMA = False  # start every residual block as the identity
_C.BN.USE_CUSTOM_WEIGHT_DECAY = False  # use CUSTOM_WEIGHT_DECAY for batch-norm parameters
_C.BN.CUSTOM_WEIGHT_DECAY = 0.0  # weight decay of batch-norm parameters
_C.BN.SYNC = False  # SyncBatchNorm: batch statistics over all processes (GPUs only)

# --------------------------------------------------------------------------------------------------- optimisation
_C.OPTIM = CfgNode()
_C.OPTIM.OPTIMIZER = "sgd"  # sgd | adamw
_C.OPTIM.BASE_LR = 0.1  # learning rate for TRAIN.BATCH_SIZE images; not scaled with the batch
_C.OPTIM.LR_POLICY = "cos"  # cos | steps | exp
_C.OPTIM.LR_PER_ITER = False  # update the rate every iteration; False updates it once per epoch, as published
_C.OPTIM.HEAD_LR_MULT = 1.0  # learning rate of the classification head = this * the rate
_C.OPTIM.GAMMA = 0.1  # exp policy: factor per epoch
_C.OPTIM.STEPS = [0, 30, 60, 90]  # steps policy: first epoch of each stage, starting with 0
_C.OPTIM.LR_MULT = 0.1  # steps policy: factor per stage
_C.OPTIM.MAX_EPOCH = 200  # number of epochs; 0 writes the untrained network as model_epoch_0000.pyth and exits
_C.OPTIM.MOMENTUM = 0.9  # SGD momentum
_C.OPTIM.DAMPENING = 0.0  # SGD dampening
_C.OPTIM.NESTEROV = True  # SGD with Nesterov momentum
_C.OPTIM.BETAS = [0.9, 0.999]  # AdamW betas
_C.OPTIM.WEIGHT_DECAY = 5e-4  # on all parameters, batch norm and biases included; the recipes use 1e-4
_C.OPTIM.WARMUP_FACTOR = 0.1  # warm-up starts at this fraction of the learning rate
_C.OPTIM.WARMUP_EPOCHS = 0  # epochs of linear warm-up
_C.OPTIM.CLIP_GRAD = 0.0  # maximum norm of the whole gradient; 0 disables clipping
_C.OPTIM.EMA_DECAY = 0.0  # moving average of the weights, used for validation and extraction; 0 disables it

# ------------------------------------------------------------------------------------------------------- training
_C.TRAIN = CfgNode()
_C.TRAIN.DATASET = "landmark"  # folder in DATA_LOADER.DATA_DIR
_C.TRAIN.SPLIT = "train_list.txt"  # list file in that folder, one `path label` per line
_C.TRAIN.BATCH_SIZE = 128  # images per step, summed over all processes
_C.TRAIN.IM_SIZE = 224  # side of the square crop in pixels
_C.TRAIN.EVAL_PERIOD = 1  # epochs between validations; the last epoch is always validated
_C.TRAIN.CHECKPOINT_PERIOD = 1  # epochs between checkpoints; the last epoch is always saved
_C.TRAIN.CHECKPOINT_ITERS = 0  # iterations between checkpoints inside an epoch; 0 saves at the ends of epochs only
_C.TRAIN.KEEP_CHECKPOINTS = 0  # newest checkpoints to keep, besides model_best.pyth; 0 keeps the end of every epoch
_C.TRAIN.AUTO_RESUME = True  # resume from the newest checkpoint in OUT_DIR (the release's default was False)
_C.TRAIN.WEIGHTS = ""  # initial weights: a file or an http(s) address
_C.TRAIN.PRECISION = "fp32"  # fp32 | tf32 | bf16 | fp16; head and loss are always float32
_C.TRAIN.COMPILE = False  # torch.compile the network; the first step takes about a minute
_C.TRAIN.ACCUM_STEPS = 1  # gradient accumulation: parts that each process's share of the batch is split into
_C.TRAIN.SAMPLING = "uniform"  # uniform: every image once per epoch | class_balanced: every class equally often
_C.TRAIN.FREEZE_AT = 0  # freeze 1: the stem, 2: also s1, ... 5: the whole backbone; 0 freezes nothing
_C.TRAIN.FREEZE_BN = False  # freeze the backbone's batch norm, statistics and parameters

# --------------------------------------------------------------------------------- validation and tested weights
_C.TEST = CfgNode()
_C.TEST.DATASET = "landmark"  # folder in DATA_LOADER.DATA_DIR
_C.TEST.SPLIT = "val_list.txt"  # list file in that folder; empty: no validation
_C.TEST.BATCH_SIZE = 200  # images per validation step, summed over all processes
_C.TEST.IM_SIZE = 256  # resize the shorter side to this, then cut the central TRAIN.IM_SIZE square
_C.TEST.RETRIEVAL = []  # Revisited sets in INFER.DATA_DIR to score every TRAIN.EVAL_PERIOD epochs
_C.TEST.WEIGHTS = ""  # weights to extract with; empty: the newest checkpoint in OUT_DIR

_C.DATA_LOADER = CfgNode()
_C.DATA_LOADER.DATA_DIR = "datasets/data"  # lists are at DATA_DIR/<DATASET>/<SPLIT>
_C.DATA_LOADER.NUM_WORKERS = 4  # loader processes per training process
_C.DATA_LOADER.MODE = "exact"  # exact: the published arithmetic | fast: resize in uint8, do the rest on the device
_C.DATA_LOADER.SKIP_BROKEN = 0  # maximum unreadable images, each replaced by the next in the list; 0 fails on the first
_C.DATA_LOADER.PIN_MEMORY = True  # page-locked batches, for faster copies to the GPU
_C.DATA_LOADER.TIMEOUT = 60.0  # seconds a worker may take for one image before the run fails; 0 waits for ever

# ----------------------------------------------------------------------------------------------------- extraction
_C.INFER = CfgNode()
_C.INFER.DATASETS = ["roxford5k", "rparis6k"]  # Revisited sets to extract and score
_C.INFER.DATA_DIR = "datasets/data"  # a set is DATA_DIR/<name>/gnd_<name>.pkl and DATA_DIR/<name>/jpg/
_C.INFER.IMAGES = ""  # a folder, a list file or tar archives to extract instead of the sets
_C.INFER.CROP_QUERY = True  # crop queries to their box (the protocol); False for the other published numbers
_C.INFER.SCALES = [0.3535, 0.5, 0.7071, 1.0, 1.4142]  # scales of the image pyramid; their descriptors are averaged
_C.INFER.TOTAL_NUM = 1  # number of shards (the release's default was 4)
_C.INFER.CUT_NUM = 1  # shard of this process, 1 .. TOTAL_NUM
_C.INFER.CHUNK_SIZE = 128  # images per chunk; an interrupted chunk is extracted again
_C.INFER.BATCH_SIZE = 0  # images of equal size per batch; 0: 1 on the CPU, 8 on a GPU
_C.INFER.NUM_WORKERS = -1  # decoding processes per shard; -1: 4 on a GPU, none on the CPU
_C.INFER.PRECISION = "fp32"  # fp32 | bf16 | fp16 arithmetic of the network; INFER.DTYPE is what is stored
_C.INFER.COMPILE = False  # torch.compile the network
_C.INFER.GPU_JPEG = False  # decode JPEGs on the GPU (needs torchvision): saves CPU time, changes pixels slightly
_C.INFER.THREADS = 1  # threads per shard on the CPU; float32 sums depend on it
_C.INFER.SKIP_BROKEN = 0  # maximum rejected images per collection; 0 fails on the first
_C.INFER.MIN_SIDE = 16  # minimum side in pixels of an image, or of a query's box; smaller ones are rejected
_C.INFER.MAX_ASPECT = 50.0  # maximum ratio of the longer side to the shorter; images above it are rejected
_C.INFER.MAX_PIXELS = 2**26  # maximum pixels according to the header; images above it are rejected before decoding
_C.INFER.MAX_LEVEL_PIXELS = 2**25  # maximum pixels at the largest scale; larger images are shrunk first
_C.INFER.DTYPE = "float32"  # float32 | float16 for descriptors on disk
_C.INFER.EXPORT = []  # further formats to write: mat, npz

# -------------------------------------------------------------------------------------------------------- scoring
_C.SCORE = CfgNode()
_C.SCORE.WHITENING = ""  # PCA whitening file from evaler/whiten.py, learned on a set other than the scored one
_C.SCORE.DBA = 0  # database augmentation: neighbours added to each image; 0 disables it
_C.SCORE.DBA_ALPHA = 3.0  # neighbour weight = similarity ** alpha
_C.SCORE.QE = 0  # query expansion: top results added to each query; 0 disables it
_C.SCORE.QE_ALPHA = 3.0  # result weight = similarity ** alpha; 0 is average query expansion
_C.SCORE.RERANK = 0  # number of top results to re-rank (SuperGlobal; the paper uses 400); 0 disables it
_C.SCORE.RERANK_NEIGHBOURS = 9  # neighbours averaged into each candidate
_C.SCORE.RERANK_BETA = 0.15  # neighbour weight = beta * similarity

# --------------------------------------------------------------------------------------------------------- search
_C.SEARCH = CfgNode()
_C.SEARCH.INDEX = ""  # faiss factory string, e.g. IVF4096,Flat; empty: exact search
_C.SEARCH.PARAMETERS = ""  # search-time parameters of that index, e.g. nprobe=32
_C.SEARCH.URI = ""  # search in Milvus: x.db (embedded) or http://HOST:19530; empty: no Milvus

# --------------------------------------------------------------------------------------------------------- devices
_C.NUM_GPUS = 1  # one process per GPU; 0 runs on the CPU. Under torchrun only the choice of GPU or CPU counts
_C.DIST_BACKEND = "nccl"  # between GPUs; on the CPU it is always gloo
_C.DIST_TIMEOUT = 600  # seconds a process waits for the others before the run fails
_C.HOST = "localhost"  # rendezvous host of the processes that train.py starts
_C.PORT = 0  # rendezvous port; 0 picks a free one (the release's default was 10001)
_C.CUDNN = CfgNode()
_C.CUDNN.BENCHMARK = True  # let cuDNN time its algorithms: faster for training's fixed size, not bit-reproducible
_C.MEM = CfgNode()
_C.MEM.RELU_INPLACE = True  # overwrite the input of ReLU, which saves memory

# ---------------------------------------------------------------------------------------------------------- output
_C.OUT_DIR = "./output"  # checkpoints, logs, features and scores of this run (the release's default was /tmp)
_C.CFG_DEST = "config.yaml"  # file in OUT_DIR for the effective configuration
_C.LOG_DEST = "both"  # stdout shows OUT_DIR/stdout.log as both (short lines) | stdout (every line) | file (nothing)
_C.LOG_PERIOD = 10  # iterations between log lines
_C.TENSORBOARD = False  # also write OUT_DIR/tensorboard (needs the package tensorboard)
_C.RNG_SEED = 1  # seed of initial weights, sample order and augmentation
_C.DOWNLOAD_CACHE = "~/.cache/dolg"  # folder for weights given by address (the release's default was in /tmp)


# Keys whose values are files or folders (or, for some, addresses). DOWNLOAD_CACHE's `~` stays in a saved configuration.
PATHS = (
    "TRAIN.WEIGHTS",
    "TEST.WEIGHTS",
    "DATA_LOADER.DATA_DIR",
    "INFER.DATA_DIR",
    "INFER.IMAGES",
    "SCORE.WHITENING",
    "SEARCH.URI",
    "OUT_DIR",
)


def get_cfg() -> CfgNode:
    """Return a fresh, unfrozen copy of the defaults."""
    return _C.clone()


def load_cfg(path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()) -> CfgNode:
    """Merge a YAML file and `KEY VALUE ...` overrides into the defaults, check and complete the result, and freeze it.

    Keys that have no effect here are reported on stderr. Raises `ConfigError` for a missing or malformed file,
    unknown keys, values of a wrong type and settings that contradict each other.
    """
    cfg, defaults = get_cfg(), get_cfg()
    notes = merge_yaml(cfg, Path(path), defaults=defaults) if path is not None else []
    notes += merge_overrides(cfg, list(overrides), defaults=defaults)
    check(cfg)
    cfg.merge_from_list([part for setting in derived(cfg).items() for part in setting])
    _expand_paths(cfg)
    cfg.freeze()
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(notes):
            print(f"note: {note}", file=sys.stderr)
    return cfg


def is_known(key: str) -> bool:
    """Whether a dotted name is a setting, or a key of old YAML files that is accepted and ignored."""
    value = find(_C, key)
    return not (value is None or isinstance(value, CfgNode)) or bool(is_ignored(key))


def is_section(name: str) -> bool:
    """Whether keys may begin with this name: TRAIN, OPTIM, ..."""
    return isinstance(find(_C, name), CfgNode) or bool(is_ignored(name))


def nearest(key: str) -> str:
    """What may have been meant by an unknown key, as the end of a message."""
    return suggestion(_C, key)


def _expand_paths(cfg: CfgNode) -> None:
    """Put the home folder for a leading `~`: a shell does so for some values of KEY VALUE, and never in a YAML file."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        node = find(cfg, section) if section else cfg
        if not node[name].isprintable():
            raise ConfigError(f"{key} {node[name]!a}: a path with control characters is most likely a mistake")
        expanded = os.path.expanduser(node[name])
        if expanded.startswith("~"):
            raise ConfigError(f"{key} {node[name]}: there is no user of that name")
        node[name] = expanded


__all__ = ["ConfigError", "get_cfg", "is_known", "is_section", "load_cfg", "nearest"]
