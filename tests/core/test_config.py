import ast
import io
import os
import re
import time
import tokenize

import pytest
import yaml
from yacs.config import CfgNode

from core import config_checks, config_values
from core.config import ConfigError, get_cfg, load_cfg
from tests.small_run import ROOT, python, script

# The release's only recipe, resnet101_delg_8gpu.yaml.
PUBLISHED = """
MODEL:
  TYPE: resnet
  DEPTH: 101
  NUM_CLASSES: 81313
  HEADS:
    IN_FEAT: 2048
    REDUCTION_DIM: 512
    MARGIN: 0.15
    SCALE: 30
RESNET:
  TRANS_FUN: bottleneck_transform
  NUM_GROUPS: 1
  WIDTH_PER_GROUP: 64
  STRIDE_1X1: False
BN:
  ZERO_INIT_FINAL_GAMMA: True
OPTIM:
  BASE_LR: 0.01
  LR_POLICY: cos
  STEPS: [0, 30, 60, 90]
  LR_MULT: 0.1
  MAX_EPOCH: 100
  MOMENTUM: 0.9
  NESTEROV: True
  WEIGHT_DECAY: 0.0001
  WARMUP_EPOCHS: 5
TRAIN:
  DATASET: landmark
  SPLIT: train_list.txt
  BATCH_SIZE: 64
  IM_SIZE: 224
  EVAL_PERIOD: 100
TEST:
  DATASET: landmark
  SPLIT: val_list.txt
  BATCH_SIZE: 64
  IM_SIZE: 256
NUM_GPUS: 8
DATA_LOADER:
  NUM_WORKERS: 4
CUDNN:
  BENCHMARK: True
OUT_DIR: ./output
"""

# The other keys that its users know, as pycls dumps them: all at the release's defaults.
PUBLISHED_DUMP = """
ANYNET: {BLOCK_TYPE: '', BOT_MULS: [], DEPTHS: [], GROUP_WS: [], SE_ON: false, SE_R: 0.25, STEM_W: 32, STRIDES: []}
BN: {CUSTOM_WEIGHT_DECAY: 0.0, EPS: 1.0e-05, MOM: 0.1, NUM_SAMPLES_PRECISE: 1024, USE_CUSTOM_WEIGHT_DECAY: false,
  USE_PRECISE_STATS: false, ZERO_INIT_FINAL_GAMMA: false}
CFG_DEST: config.yaml
CUDNN: {BENCHMARK: true}
DATA_LOADER: {NUM_WORKERS: 8, PIN_MEMORY: true}
DIST_BACKEND: nccl
DOWNLOAD_CACHE: /tmp/pycls-download-cache
EN: {DC_RATIO: 0.0, DEPTHS: [], DROPOUT_RATIO: 0.0, EXP_RATIOS: [], HEAD_W: 1280, KERNELS: [], STEM_W: 32}
HOST: localhost
INFER: {CUT_NUM: 1, TOTAL_NUM: 4}
LOG_DEST: stdout
LOG_PERIOD: 10
MEM: {RELU_INPLACE: true}
MODEL:
  DEPTH: 50
  HEADS: {CLS_LAYER: linear, IN_FEAT: 2048, MARGIN: 0.15, NAME: '', NUM_CLASSES: 1000, POOL_LAYER: '',
    REDUCTION_DIM: 512, SCALE: 128}
  LOSSES: {NAME: cross_entropy}
  NUM_CLASSES: 10
  S2_DIM: 512
  S3_DIM: 1024
  S4_DIM: 2048
  TYPE: resnet
  WITH_MA: false
NUM_GPUS: 1
OPTIM: {BASE_LR: 0.1, DAMPENING: 0.0, GAMMA: 0.1, LR_MULT: 0.1, LR_POLICY: cos, MAX_EPOCH: 200, MOMENTUM: 0.9,
  NESTEROV: true, STEPS: [], WARMUP_EPOCHS: 0, WARMUP_FACTOR: 0.1, WEIGHT_DECAY: 0.0005}
OUT_DIR: /tmp
PORT: 10001
PREC_TIME: {NUM_ITER: 30, WARMUP_ITER: 3}
REGNET: {BOT_MUL: 1.0, DEPTH: 10, GROUP_W: 16, SE_ON: false, STEM_W: 32, W0: 32, WA: 5.0, WM: 2.5}
RESNET: {NUM_GROUPS: 1, STRIDE_1X1: true, TRANS_FUN: bottleneck_transform, WIDTH_PER_GROUP: 64}
RNG_SEED: 1
TEST: {BATCH_SIZE: 200, DATASET: '', IM_SIZE: 256, SPLIT: val, WEIGHTS: ''}
TRAIN: {AUTO_RESUME: false, BATCH_SIZE: 128, CHECKPOINT_PERIOD: 1, DATASET: '', EVAL_PERIOD: 1, IM_SIZE: 224,
  SPLIT: train, WEIGHTS: ''}
"""


def leaves(tree: dict, prefix: str = "") -> dict:
    """Dotted key -> value."""
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


@pytest.fixture
def load(tmp_path, capsys):
    """Write YAML to a file and load it; returns the configuration and what was said on stderr."""

    def load(text: str = "", *overrides: str) -> tuple[CfgNode, list[str]]:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        cfg = load_cfg(path, overrides)
        return cfg, capsys.readouterr().err.splitlines()

    return load


def test_get_cfg_gives_fresh_unfrozen_copies():
    first, second = get_cfg(), get_cfg()
    first.OPTIM.BASE_LR = 123.0
    first.OPTIM.STEPS.append(7)
    first.INFER.SCALES[0] = 9.0
    assert second == get_cfg() != first
    assert not first.is_frozen()


def test_a_loaded_configuration_is_frozen(load):
    cfg, notes = load("NUM_GPUS: 0")
    assert cfg.is_frozen() and cfg.OPTIM.is_frozen() and notes == []
    with pytest.raises(AttributeError):
        cfg.OPTIM.BASE_LR = 1.0


def test_loading_leaves_the_defaults_alone(load):
    before = leaves(get_cfg())
    load("OPTIM: {STEPS: [0, 5], BASE_LR: 1}", "INFER.SCALES", "[1]", "NUM_GPUS", "0")
    assert leaves(get_cfg()) == before


def test_the_published_recipe_loads_as_it_is(load):
    cfg, notes = load(PUBLISHED)
    assert notes == []
    changed = leaves(yaml.safe_load(PUBLISHED))
    assert len(changed) == 34
    assert {key: value for key, value in leaves(cfg).items() if key in changed} == changed
    others = {key: value for key, value in leaves(load_cfg(None)).items() if key not in changed}
    assert {key: value for key, value in leaves(cfg).items() if key not in changed} == others


def test_a_complete_dump_of_the_release_loads_and_what_is_ignored_is_reported(load):
    cfg, notes = load(PUBLISHED_DUMP)
    reported = {re.search(r": (\S+) (is ignored|linear)", note)[1] for note in notes}
    dead = {"ANYNET", "EN", "REGNET", "PREC_TIME", "MODEL.S2_DIM", "MODEL.HEADS.NAME", "MODEL.HEADS.NUM_CLASSES"}
    assert reported == dead | {"MODEL.HEADS.POOL_LAYER", "MODEL.HEADS.CLS_LAYER"}
    assert all(note.startswith("note: ") and "some.yaml" in note for note in notes)
    assert len(notes) == len(reported)
    taken = leaves(cfg)
    for key, value in leaves(yaml.safe_load(PUBLISHED_DUMP)).items():
        if not any(key == ignored or key.startswith(f"{ignored}.") for ignored in reported):
            assert taken[key] == value, key
    assert cfg.MODEL.HEADS.CLS_LAYER == "arcface"


@pytest.mark.parametrize(
    "overrides", [["MODEL.HEADS.CLS_LAYER", "linear"], ["REGNET.WA", "5", "PREC_TIME.NUM_ITER", "1"]]
)
def test_keys_without_effect_are_reported_on_the_command_line_too(load, overrides):
    cfg, notes = load("MODEL: {HEADS: {CLS_LAYER: curricularface}}", *overrides)
    assert len(notes) == len(overrides) // 2 and all("the command line" in note for note in notes)
    assert cfg.MODEL.HEADS.CLS_LAYER == ("arcface" if "linear" in overrides else "curricularface")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_our_recipes_load_and_repeat_no_default(path, capsys):
    load_cfg(path)
    assert capsys.readouterr().err == ""
    if "delg" in path.name:  # these hold the published keys, whatever our defaults are
        assert set(leaves(yaml.safe_load(path.read_text()))) >= set(leaves(yaml.safe_load(PUBLISHED)))
        return
    defaults = leaves(get_cfg())
    repeated = [key for key, value in leaves(yaml.safe_load(path.read_text())).items() if defaults[key] == value]
    assert repeated == []


def test_the_published_recipe_of_ours_differs_only_in_naming_the_head():
    ours = leaves(yaml.safe_load((ROOT / "configs" / "resnet101_delg_8gpu.yaml").read_text()))
    assert ours.pop("MODEL.HEADS.CLS_LAYER") == "curricularface"
    assert ours == leaves(yaml.safe_load(PUBLISHED))


@pytest.mark.parametrize("size", [50, 101])
def test_the_papers_recipe(size):
    cfg = load_cfg(ROOT / "configs" / f"resnet{size}_dolg_8gpu.yaml")
    assert (cfg.MODEL.DEPTH, cfg.TRAIN.IM_SIZE, cfg.TRAIN.BATCH_SIZE, cfg.OPTIM.BASE_LR) == (size, 512, 128, 0.05)
    assert (cfg.MODEL.WITH_MA, cfg.MODEL.GEM.TRAINABLE, cfg.MODEL.GEM.P) == (True, False, 3.0)
    assert (cfg.MODEL.HEADS.CLS_LAYER, cfg.MODEL.HEADS.MARGIN, cfg.MODEL.HEADS.SCALE) == ("arcface", 0.15, 30.0)
    assert (cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR_POLICY, cfg.NUM_GPUS, cfg.RESNET.STRIDE_1X1) == (100, "cos", 8, False)


def test_a_saved_configuration_merges_back_to_an_equal_one(load):
    changes = "BN.EPS 1e-7 OPTIM.STEPS [0] INFER.DATASETS a,b OUT_DIR ./it's_here INFER.SCALES 1,0.3535 NUM_GPUS 0"
    cfg, _ = load(PUBLISHED, *changes.split(), "TRAIN.WEIGHTS", "1e5", "TEST.SPLIT", "")
    assert cfg.TRAIN.WEIGHTS == "1e5" and cfg.INFER.DATASETS == ["a", "b"]
    again, notes = load(cfg.dump())
    assert again == cfg and notes == []
    assert [type(value) for value in leaves(again).values()] == [type(value) for value in leaves(cfg).values()]


def test_values_take_the_type_of_their_default(load):
    text = "OPTIM: {BASE_LR: 1, WEIGHT_DECAY: 1e-4, MAX_EPOCH: 3}\nINFER: {SCALES: [1, '5e-1'], DATASETS: toy}"
    cfg, _ = load(
        text, "BN.EPS", "1e-3", "BN.MOM", "1", "MODEL.HEADS.SCALE", "64", "OUT_DIR", "2024", "TRAIN.SPLIT", "a b"
    )
    assert (cfg.OPTIM.BASE_LR, cfg.OPTIM.WEIGHT_DECAY, cfg.BN.EPS, cfg.BN.MOM) == (1.0, 1e-4, 1e-3, 1.0)
    assert type(cfg.OPTIM.BASE_LR) is type(cfg.MODEL.HEADS.SCALE) is type(cfg.INFER.SCALES[0]) is float
    assert cfg.INFER.SCALES == [1.0, 0.5] and cfg.INFER.DATASETS == ["toy"]
    assert cfg.OUT_DIR == "2024" and cfg.TRAIN.SPLIT == "a b"


def test_the_command_line_wins_and_its_last_word_counts(load):
    cfg, _ = load("OPTIM: {MAX_EPOCH: 3}", "OPTIM.MAX_EPOCH", "4", "OPTIM.MAX_EPOCH", "5")
    assert cfg.OPTIM.MAX_EPOCH == 5


def test_a_list_can_be_emptied_and_filled_again(load):
    cfg, _ = load("INFER: {DATASETS: []}\nOPTIM: {STEPS: []}", "INFER.DATASETS", "toy", "OPTIM.STEPS", "[0, 30]")
    assert cfg.INFER.DATASETS == ["toy"] and cfg.OPTIM.STEPS == [0, 30]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("NUM_GPUS", "1.0", "a whole number"),
        ("NUM_GPUS", "True", "a whole number"),
        ("NUM_GPUS", "two", "a whole number"),
        ("OPTIM.BASE_LR", "fast", "a number"),
        ("OPTIM.BASE_LR", "False", "a number"),
        ("OPTIM.NESTEROV", "1", "True or False"),
        ("OPTIM.NESTEROV", "yes", "True or False"),
        ("INFER.SCALES", "[1, 'x']", "a number"),
        ("OPTIM.STEPS", "[0, 1.5]", "a whole number"),
        ("OPTIM.STEPS", "{1: 2}", "a whole number"),
    ],
)
def test_a_wrong_type_on_the_command_line(load, key, value, expected):
    with pytest.raises(ConfigError, match=rf"^the command line: {key} takes {expected}, not "):
        load("", key, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OUT_DIR: 3", "OUT_DIR takes text, not 3"),
        ("TRAIN: {WEIGHTS: }", "TRAIN.WEIGHTS takes text, not None"),
        ("OPTIM: {BASE_LR: {a: 1}}", "OPTIM.BASE_LR takes a number, not {'a': 1}"),
        ("OPTIM: {STEPS: {a: 1}}", "OPTIM.STEPS takes a whole number, not {'a': 1}"),
        ("OPTIM: 3", "OPTIM is a section, give one of its keys: OPTIMIZER, "),
        ("OPTIM:", "OPTIM is a section, give one of its keys: OPTIMIZER, "),
        ("- 1\n- 2", "a configuration is a mapping of keys to values, this is a list"),
        ("just text", "a configuration is a mapping of keys to values, this is a str"),
    ],
)
def test_a_wrong_type_in_a_file(load, text, message):
    with pytest.raises(ConfigError, match=rf"some\.yaml: {re.escape(message)}"):
        load(text)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("OPTIM.BASE_LRR", "OPTIM.BASE_LR"),
        ("optim.base_lr", "OPTIM.BASE_LR"),
        ("TRIAN.BATCH_SIZE", "TRAIN.BATCH_SIZE"),
        ("NUM_GPU", "NUM_GPUS"),
        ("MODEL.MARGIN", "MODEL.HEADS.MARGIN"),
        ("WARMUP_EPOCHS", "OPTIM.WARMUP_EPOCHS"),
        ("OPTIM.BASE_LR.X", "OPTIM.BASE_LR"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(load, key, nearest):
    with pytest.raises(ConfigError, match=rf"^the command line: unknown key {key}; did you mean {nearest}\?$"):
        load("", key, "1")


def test_a_misspelt_section_names_the_nearest_section(load):
    with pytest.raises(ConfigError, match=r"some\.yaml: unknown key TRIAN; did you mean TRAIN\?$"):
        load("TRIAN: {BATCH_SIZE: 4}")


def test_an_unknown_key_like_no_other(load):
    with pytest.raises(ConfigError, match=r"unknown key 5; core/config\.py lists all keys"):
        load("5: 6")


def test_malformed_yaml_names_file_and_line(load):
    with pytest.raises(ConfigError, match=r"some\.yaml line 3: not valid YAML: .*\S$") as raised:
        load("NUM_GPUS: 0\nOPTIM:\n\tBASE_LR: 1\n")
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load_cfg(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cfg(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_cfg(tmp_path / "binary.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes to it
    with pytest.raises(ConfigError, match=r"pipe\.yaml: cannot be read as a configuration file: it is no file"):
        load_cfg(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").write_text("a: b\n" * 50_000)
    with pytest.raises(ConfigError, match="more than the 200,000 characters"):
        load_cfg(tmp_path / "huge.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_cfg(tmp_path / "empty.yaml") == load_cfg(None)


def test_yaml_executes_nothing(load, tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(f"OUT_DIR: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("overrides", [["NUM_GPUS"], ["NUM_GPUS", "0", "OUT_DIR"]])
def test_an_odd_number_of_overrides(load, overrides):
    with pytest.raises(ConfigError, match=rf"KEY VALUE pairs, but '{overrides[-1]}' stands alone"):
        load("", *overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("TEST.IM_SIZE 200", ["TEST.IM_SIZE 200", "TRAIN.IM_SIZE 224"]),
        ("TRAIN.IM_SIZE 31", ["TRAIN.IM_SIZE"]),
        ("TRAIN.BATCH_SIZE 1 TRAIN.IM_SIZE 32", ["TRAIN.BATCH_SIZE 1", "TRAIN.IM_SIZE 32"]),
        ("NUM_GPUS 2 TRAIN.BATCH_SIZE 2 TRAIN.IM_SIZE 32", ["TRAIN.BATCH_SIZE 2", "one image"]),
        ("TRAIN.BATCH_SIZE 9 NUM_GPUS 2", ["TRAIN.BATCH_SIZE 9", "NUM_GPUS 2"]),
        ("TRAIN.BATCH_SIZE 0", ["TRAIN.BATCH_SIZE"]),
        ("NUM_GPUS -1", ["NUM_GPUS"]),
        ("MODEL.TYPE regnet", ["MODEL.TYPE regnet", "resnet"]),
        ("MODEL.DEPTH 49", ["MODEL.DEPTH 49", "18, 34, 50, 101, 152"]),
        ("MODEL.DEPTH 18 RESNET.TRANS_FUN bottleneck_transform", ["TRANS_FUN bottleneck_", "DEPTH 18", "basic_tr"]),
        ("MODEL.DEPTH 18 MODEL.S4_DIM 2048", ["MODEL.S4_DIM 2048", "a ResNet of MODEL.DEPTH 18", "has 512"]),
        ("MODEL.DEPTH 18 RESNET.NUM_GROUPS 32", ["RESNET.NUM_GROUPS 32", "MODEL.DEPTH 18"]),
        ("RESNET.NUM_GROUPS 0", ["RESNET.NUM_GROUPS is 0"]),
        ("RESNET.TRANS_FUN basic_transform", ["MODEL.DEPTH 50", "bottleneck_transform"]),
        ("RESNET.TRANS_FUN none", ["RESNET.TRANS_FUN none", "bottleneck_transform"]),
        ("MODEL.S3_DIM 256", ["MODEL.S3_DIM 256", "has 1024", "leave the key out"]),
        ("MODEL.HEADS.IN_FEAT 1024", ["MODEL.HEADS.IN_FEAT 1024", "2048"]),
        ("MODEL.DEPTH 18 MODEL.HEADS.IN_FEAT 2048", ["MODEL.HEADS.IN_FEAT 2048", "FUSION orthogonal has 512"]),
        ("MODEL.FUSION global MODEL.WITH_MA True", ["MODEL.FUSION global", "MODEL.WITH_MA"]),
        ("MODEL.FUSION sum", ["MODEL.FUSION sum", "orthogonal, global"]),
        ("MODEL.HEADS.CLS_LAYER sphereface", ["MODEL.HEADS.CLS_LAYER sphereface", "arcface, curricularface, cosine"]),
        ("MODEL.HEADS.MARGIN 1.6", ["MODEL.HEADS.MARGIN"]),
        ("MODEL.HEADS.SCALE 0", ["MODEL.HEADS.SCALE"]),
        ("MODEL.GEM.P nan", ["MODEL.GEM.P"]),
        ("MODEL.LOSSES.NAME triplet", ["MODEL.LOSSES.NAME triplet"]),
        ("OPTIM.BASE_LR nan", ["OPTIM.BASE_LR"]),
        ("OPTIM.BASE_LR inf", ["OPTIM.BASE_LR"]),
        ("OPTIM.DAMPENING -0.5", ["OPTIM.DAMPENING"]),
        ("BN.MOM 1.5", ["BN.MOM"]),
        ("OPTIM.LR_POLICY step", ["OPTIM.LR_POLICY step", "steps"]),
        ("OPTIM.LR_POLICY steps OPTIM.STEPS [30,60]", ["OPTIM.STEPS [30, 60]"]),
        ("OPTIM.LR_POLICY steps OPTIM.STEPS [0,60,30]", ["OPTIM.STEPS [0, 60, 30]"]),
        ("OPTIM.LR_POLICY steps OPTIM.STEPS []", ["OPTIM.STEPS []"]),
        ("OPTIM.MOMENTUM 0", ["OPTIM.NESTEROV", "OPTIM.MOMENTUM"]),
        ("OPTIM.DAMPENING 0.5", ["OPTIM.NESTEROV", "OPTIM.DAMPENING"]),
        ("BN.SYNC True", ["BN.SYNC", "NUM_GPUS"]),
        ("MODEL.HEADS.SHARDED True TRAIN.PRECISION fp16", ["MODEL.HEADS.SHARDED", "bf16"]),
        ("TRAIN.PRECISION half", ["TRAIN.PRECISION half", "bf16"]),
        ("TRAIN.BATCH_SIZE 8 TRAIN.ACCUM_STEPS 3", ["TRAIN.ACCUM_STEPS 3", "8 images"]),
        ("TRAIN.FREEZE_AT 6", ["TRAIN.FREEZE_AT 6"]),
        ("TEST.RETRIEVAL a,a", ["TEST.RETRIEVAL", "twice"]),
        ("OPTIM.OPTIMIZER lamb", ["OPTIM.OPTIMIZER lamb", "adamw"]),
        ("OPTIM.EMA_DECAY 1", ["OPTIM.EMA_DECAY"]),
        ("OPTIM.BETAS 0.9", ["OPTIM.BETAS"]),
        ("INFER.CUT_NUM 2", ["INFER.CUT_NUM is 2", "INFER.TOTAL_NUM"]),
        ("INFER.CUT_NUM 0", ["INFER.CUT_NUM is 0"]),
        ("INFER.SCALES []", ["INFER.SCALES"]),
        ("INFER.SCALES [1,-1]", ["INFER.SCALES"]),
        ("INFER.DATASETS a,a", ["INFER.DATASETS", "twice"]),
        ("PORT 70000", ["PORT"]),
        ("LOG_DEST screen", ["LOG_DEST screen", "both, stdout, file"]),
        ("LOG_PERIOD 0", ["LOG_PERIOD"]),
        ("DIST_BACKEND mpi", ["DIST_BACKEND mpi"]),
        ("RNG_SEED -1", ["RNG_SEED"]),
    ],
)
def test_contradictions_are_refused(overrides, named):
    arguments = overrides.split()
    if "OUT_DIR" not in arguments and "NUM_GPUS" not in arguments:
        arguments += ["NUM_GPUS", "0"]
    with pytest.raises(ConfigError) as raised:
        load_cfg(None, arguments)
    message = str(raised.value)
    assert all(part in message for part in named) and "\n" not in message, message


@pytest.mark.parametrize(
    "overrides",
    [
        "MODEL.DEPTH 34 RESNET.TRANS_FUN basic_transform MODEL.S3_DIM 256 MODEL.S4_DIM 512 MODEL.HEADS.IN_FEAT 512",
        "MODEL.DEPTH 18",
        "RESNET.NUM_GROUPS 32 RESNET.WIDTH_PER_GROUP 4",
        "MODEL.FUSION global",
        "OPTIM.NESTEROV False OPTIM.DAMPENING 0.5 OPTIM.MOMENTUM 0",
        "TEST.IM_SIZE 224",
        "OPTIM.MAX_EPOCH 0",
        "OPTIM.LR_POLICY steps",
        "INFER.TOTAL_NUM 4 INFER.CUT_NUM 4",
    ],
)
def test_settings_that_fit_are_accepted(overrides):
    assert load_cfg(None, overrides.split()).is_frozen()


def test_an_empty_out_dir_is_refused():
    with pytest.raises(ConfigError, match="OUT_DIR is empty"):
        load_cfg(None, ["OUT_DIR", ""])


def test_every_key_is_commented_in_the_source():
    source = (ROOT / "core" / "config.py").read_text()
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    defined = {}
    for node in ast.parse(source).body:
        target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if target.startswith("_C.") and "CfgNode" not in ast.unparse(node.value):
            defined[target.removeprefix("_C.")] = node.end_lineno
    assert set(defined) == set(leaves(get_cfg()))
    assert [key for key, line in defined.items() if line not in commented] == []


def attribute_chains(source: str) -> set[str]:
    """`A.B.C` for every attribute access `something.A.B.C`, and every string constant."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            found |= {dotted.split(".", start)[-1] for start in range(1, dotted.count(".") + 1)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_every_key_is_read_somewhere_or_reported_as_ignored():
    files = [*(ROOT / "core").rglob("*.py"), *(ROOT / "evaler").rglob("*.py"), ROOT / "train.py"]
    files.append(ROOT / "model" / "backbones.py")
    read = set().union(*(attribute_chains(path.read_text()) for path in files if path.name != "config.py"))
    assert sorted(key for key in leaves(get_cfg()) if key not in read) == []


def test_no_key_is_both_accepted_and_ignored():
    keys = set(leaves(get_cfg()))
    for ignored in config_values.IGNORED:
        assert not any(key == ignored or key.startswith(f"{ignored}.") for key in keys), ignored


def test_every_checked_key_exists():
    keys = set(leaves(get_cfg()))
    named = {*config_checks.CHOICES, *config_checks.AT_LEAST_ONE, *config_checks.NOT_NEGATIVE, *config_checks.POSITIVE}
    assert named <= keys


@pytest.mark.parametrize(
    "text",
    ["TRAIN:\n  IM_SIZE: 64\nTEST: {IM_SIZE: 300}\nTRAIN:\n  SPLIT: a\n", "NUM_GPUS: 1\n\n\nNUM_GPUS: 2\n"],
)
def test_a_key_given_twice_in_yaml_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    key = text.partition(":")[0]
    with pytest.raises(ConfigError, match=re.escape(f"{path} line 4: not valid YAML: {key} is there twice")):
        load_cfg(path)


# ------------------------------------------------------------------------------------------------ YAML that means harm


def laughs(levels: int) -> str:
    return "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels)
    )


def merges(levels: int) -> str:
    return "m0: &m0 {b: c}\n" + "".join(
        f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n" for i in range(1, levels)
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (laughs(9), "more than 20,000 values"),
        (merges(30), "more than 20,000 values"),
        ("OUT_DIR: &a [*a]", "stands inside what it refers to"),
        ("[" * 40_000, "nested more than 20 deep"),
        ("{a: " * 5_000, "nested more than 20 deep"),
        ("- " * 5_000, "nested more than 20 deep"),
        ("x" * 300_000, "more than the 200,000 characters"),
        ("OUT_DIR: 2020-13-45", "a value of kind 'timestamp' is no setting; write it in quotes"),
        ("OUT_DIR: 2020-12-05", "a value of kind 'timestamp' is no setting; write it in quotes"),
        ("!!map abc", "expected a mapping node"),
        ("OUT_DIR: !!int abc", "'abc' is not of kind int"),
        ("OUT_DIR: !!int ''", "'' is not of kind int"),
        ("OUT_DIR: !!float ''", "'' is not of kind float"),
        ("OUT_DIR: !!bool abc", "'abc' is not of kind bool"),
        ("OUT_DIR: !!int [1]", "expected a scalar node"),
        ("OUT_DIR: !!binary aGVsbG8=", "kind 'binary'"),
        ("OUT_DIR: !!set {a}", "kind 'set'"),
        ("OUT_DIR: !!omap [a: 1]", "kind 'omap'"),
        ("OUT_DIR: !mine a", "kind '!mine'"),
        ("OUT_DIR: !!python/name:os.system x", "kind 'os.system'"),
        ("NUM_GPUS: " + "9" * 5_000, "is not of kind int"),
        ("NUM_GPUS: " + "9" * 4_000, "a whole number of more than 64 bits"),
        ("NUM_GPUS: 0x" + "f" * 9_000, "a whole number of more than 64 bits"),
        ("{[1]: 2}", "found unhashable key"),
        ("? {a: b}\n: c", "found unhashable key"),
        ("OUT_DIR: a\0b", "unacceptable character"),
        ("--- a\n--- b", "expected a single document"),
        ("OUT_DIR: 'abc", "found unexpected end of stream"),
        ("%YAML 9.9\n--- a", "incompatible YAML document"),
        ("OUT_DIR: *nowhere", "found undefined alias"),
    ],
)
def test_any_fault_of_yaml_is_one_line_in_time(load, text, problem):
    begun = time.process_time()
    with pytest.raises(ConfigError, match=rf"some\.yaml( line \d+)?: not valid YAML: .*{re.escape(problem)}") as raised:
        load(text)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("text", ["NUM_GPUS: [[[1]]]", "NUM_GPUS: {a: {b: c}}", f"OUT_DIR: {[list(range(99))] * 9}"])
def test_values_of_other_types_are_shown_in_short(load, text):
    with pytest.raises(ConfigError, match=r"some\.yaml: (NUM_GPUS takes|OUT_DIR takes)") as raised:
        load(text)
    assert len(str(raised.value)) < 300


def test_aliases_and_merges_of_a_usual_size_are_read(load):
    cfg, _ = load("TRAIN: &split {IM_SIZE: 64}\nTEST: {<<: *split, IM_SIZE: 70}\nHOST: &a toy\nOUT_DIR: *a")
    assert (cfg.TRAIN.IM_SIZE, cfg.TEST.IM_SIZE, cfg.OUT_DIR) == (64, 70, "toy")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("9" * 5_000, "takes a whole number, not '9999"),
        ("9" * 4_000, "takes a whole number, not a number of more than 64 bits"),
        ("0x" + "f" * 9_000, "takes a whole number, not a number of more than 64 bits"),
        ("[" * 9_000, "takes a whole number, not '[[[["),
        ("-" * 100_000 + "1", "takes a whole number, not '----"),
        ("{[]: 1}", "takes a whole number, not '{[]: 1}'"),
        ("1\0", "takes a whole number, not '1"),
    ],
)
def test_overrides_of_any_text_are_values_or_one_line(load, value, shown):
    with pytest.raises(ConfigError, match=re.escape(f"the command line: NUM_GPUS {shown}")) as raised:
        load("", "NUM_GPUS", value)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_a_number_too_large_for_a_float_is_refused(load):
    with pytest.raises(ConfigError, match=r"OPTIM\.BASE_LR takes a number, not a number of more than 64 bits"):
        load("", "OPTIM.BASE_LR", "9" * 400)


def test_yaml_is_read_in_one_place_only():
    packages = ("core", "datasets", "evaler", "model", "revisitop", "scripts")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    assert [path for path, text in sources.items() if re.search(r"^\s*(import|from) yaml\b", text, re.M)] == [
        "core/base/safe_yaml.py"
    ]


def test_the_settings_files_that_ended_in_tracebacks(shared):
    for name in ("bad_date.yaml", "deep_nesting.yaml", "map_tag_on_scalar.yaml"):
        with pytest.raises(ConfigError, match=f"{name} line 1: not valid YAML"):
            load_cfg(shared / "cases" / name)


# ------------------------------------------------------------------------------------- what the backbone decides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("MODEL.DEPTH 101", [1024, 2048, 2048, "bottleneck_transform"]),
        ("MODEL.DEPTH 34", [256, 512, 512, "basic_transform"]),
        ("MODEL.DEPTH 50 MODEL.FUSION global", [1024, 2048, 2048, "bottleneck_transform"]),
        ("MODEL.DEPTH 18 MODEL.FUSION global MODEL.S3_DIM 256", [256, 512, 512, "basic_transform"]),
    ],
)
def test_what_the_backbone_decides_is_filled_in(overrides, expected):
    cfg = load_cfg(None, overrides.split())
    model = cfg.MODEL
    assert [model.S3_DIM, model.S4_DIM, model.HEADS.IN_FEAT, cfg.RESNET.TRANS_FUN] == expected


def test_reading_a_configuration_loads_no_torch(tmp_path):
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport core.config\ncore.config.load_cfg(None)\n"
    ended = python(script(tmp_path, program + "assert 'torch' not in sys.modules\n"), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
