"""Every mistake of a user gets one clear line, an exit code that is not 0, and no OUT_DIR that was not there.

One mistake of each command is made in a real process, the others in this one.
"""

import contextlib
import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import train
from core import builders
from core.checkpoints.checkpoint import checkpoints
from core.config import load_cfg
from core.logging import setup_logging
from evaler.extraction import command as extraction
from evaler.scoring import revisited as scoring
from model.weights.loading import read_checkpoint
from tests.small_run import (
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    cut_short,
    landmarks,
    messages,
    overrides,
    python,
    retrieval_set,
)

TRAIN, INFER, EVALUATE = "train.py", "evaler/infer.py", "evaler/evaluate.py"
MAIN = {TRAIN: train.main, INFER: extraction.main, EVALUATE: scoring.main}
GLOBAL_ONLY = {"MODEL.FUSION": "global"}


@dataclass
class Mistake:
    command: str
    settings: dict  # {folder} stands for the folder with the test's files
    said: tuple[str, ...]  # the line begins with the first, and has the others in it
    cfg: str = "good.yaml"
    extra: tuple[str, ...] = field(default=())


def mistake(command: str, *said: str, cfg: str = "good.yaml", extra: tuple[str, ...] = (), **settings) -> Mistake:
    return Mistake(command, {key.replace("__", "."): value for key, value in settings.items()}, said, cfg, extra)


MISTAKES = {
    # configuration
    "missing configuration file": mistake(TRAIN, "absent.yaml: no such configuration file", cfg="absent.yaml"),
    "unknown key in the file": mistake(
        TRAIN, "unknown.yaml: unknown key OPTIM.BASE_RATE; did you mean OPTIM.BASE_LR?", cfg="unknown.yaml"
    ),
    "malformed YAML": mistake(TRAIN, "malformed.yaml line 2: not valid YAML", cfg="malformed.yaml"),
    "a key without value": mistake(TRAIN, "settings are given as KEY VALUE pairs, but 'PORT'", extra=("PORT",)),
    "more GPUs than present": mistake(TRAIN, "NUM_GPUS 64: this machine has ", NUM_GPUS=64, TRAIN__BATCH_SIZE=128),
    # lists and images
    "missing list file": mistake(TRAIN, "{folder}/data/tiny/absent.txt: no such list file", TRAIN__SPLIT="absent.txt"),
    "bad line in the list": mistake(
        TRAIN, "{folder}/data/tiny/bad.txt, line 3: ", "'three' is not an integer", TRAIN__SPLIT="bad.txt"
    ),
    "label out of range": mistake(
        TRAIN, "{folder}/data/tiny/range.txt, line 4: the label 3 is out of range 0..2", TRAIN__SPLIT="range.txt"
    ),
    "missing image": mistake(
        TRAIN,
        "{folder}/data/tiny/missing.txt, line 2: no such image: {folder}/data/tiny/train/nowhere.jpg",
        TRAIN__SPLIT="missing.txt",
    ),
    "truncated image": mistake(
        TRAIN, "{folder}/data/tiny/cut.txt, line 5: {folder}/data/tiny/cut.jpg: truncated", TRAIN__SPLIT="cut.txt"
    ),
    "truncated image met by a worker": mistake(
        TRAIN,
        "{folder}/data/tiny/cut.txt, line 5: {folder}/data/tiny/cut.jpg: truncated",
        TRAIN__SPLIT="cut.txt",
        DATA_LOADER__NUM_WORKERS=2,
    ),
    "truncated image to validate": mistake(
        TRAIN,
        "{folder}/data/tiny/cut.txt, line 5: {folder}/data/tiny/cut.jpg: truncated",
        TEST__SPLIT="cut.txt",
        DATA_LOADER__NUM_WORKERS=2,
        LOG_DEST="file",
    ),
    # weights
    "initial weights of another depth": mistake(
        TRAIN,
        "{folder}/other.pyth: ",
        "another architecture",
        "MODEL.DEPTH 34",
        "50",
        TRAIN__WEIGHTS="{folder}/other.pyth",
    ),
    "initial weights that are not there": mistake(
        TRAIN, "{folder}/absent.pyth: no such weight file", TRAIN__WEIGHTS="{folder}/absent.pyth"
    ),
    "initial weights that hold something else": mistake(
        TRAIN, "{folder}/harmful.pyth: not a weight file", TRAIN__WEIGHTS="{folder}/harmful.pyth"
    ),
    "no weights given": mistake(INFER, "no weights: set TEST.WEIGHTS, or train first", TEST__WEIGHTS=""),
    "tested weights of another depth": mistake(
        INFER,
        "{folder}/other.pyth: ",
        "another architecture",
        "MODEL.DEPTH 34",
        "50",
        TEST__WEIGHTS="{folder}/other.pyth",
    ),
    "tested weights that are cut short": mistake(
        INFER, "{folder}/cut.pyth: not a readable weight file", TEST__WEIGHTS="{folder}/cut.pyth"
    ),
    # extraction and scoring
    "extraction without ground truth": mistake(
        INFER,
        "{folder}/data/absent/gnd_absent.pkl: there is no ground truth; datasets/DATA.md",
        INFER__DATASETS="absent",
    ),
    "scoring without ground truth": mistake(
        EVALUATE,
        "{folder}/data/absent/gnd_absent.pkl: there is no ground truth; datasets/DATA.md",
        INFER__DATASETS="absent",
    ),
    "scoring without descriptors": mistake(EVALUATE, "{folder}/new/out/features/toy: no descriptors of 'queries'"),
    "missing image of the database": mistake(
        INFER, "{folder}/data/gap/jpg/image3.jpg: no such image (1 of 5", INFER__DATASETS="['toy', 'gap']"
    ),
    "truncated query": mistake(INFER, "{folder}/data/cutquery/jpg/query1.jpg: truncated", INFER__DATASETS="cutquery"),
    "truncated image of the database": mistake(
        INFER, "{folder}/data/cutimage/jpg/image4.jpg: truncated", INFER__DATASETS="cutimage"
    ),
    "box outside its picture": mistake(
        INFER, "{folder}/data/box/jpg/query0.jpg: the query's box", INFER__DATASETS="box"
    ),
    "a folder without images": mistake(
        INFER, "INFER.IMAGES {folder}/empty: no image in it", INFER__IMAGES="{folder}/empty"
    ),
}


IN_A_PROCESS = ("truncated image met by a worker", "truncated image of the database", "scoring without descriptors")
AFTER_THE_QUERIES = "truncated image of the database"
# Met after the first updates, which are saved.
WHILE_TRAINING = ("truncated image", "truncated image met by a worker", "truncated image to validate")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def write_files(folder: Path) -> None:
    """Everything the mistakes need, and what is right around them."""
    (folder / "good.yaml").write_text("BN: {ZERO_INIT_FINAL_GAMMA: True}\n")
    (folder / "unknown.yaml").write_text("OPTIM: {BASE_RATE: 1}\n")
    (folder / "malformed.yaml").write_text("OPTIM:\n\tBASE_LR: 1\n")
    (folder / "empty").mkdir()
    (folder / "empty" / "readme.txt").touch()

    tiny = landmarks(folder / "data", train=8, val=3) / "tiny"
    lines = (tiny / "train_list.txt").read_text().splitlines()
    cut_short((tiny / "train" / "00.jpg").rename(tiny / "cut.jpg"))
    lines[0] = lines[6]
    for name, line, text in (
        ("train_list.txt", 1, lines[6]),
        ("bad.txt", 3, "train/02.jpg three"),
        ("range.txt", 4, "train/03.jpg 3"),
        ("missing.txt", 2, "train/nowhere.jpg 1"),
        ("cut.txt", 5, "cut.jpg 1"),
    ):
        (tiny / name).write_text("\n".join([*lines[: line - 1], text, *lines[line:]]))

    for name in ("toy", "gap", "cutquery", "cutimage", "box"):
        retrieval_set(folder / "data", name)
    (folder / "data" / "gap" / "jpg" / "image3.jpg").unlink()
    cut_short(folder / "data" / "cutquery" / "jpg" / "query1.jpg")
    cut_short(folder / "data" / "cutimage" / "jpg" / "image4.jpg")
    truth = folder / "data" / "box" / "gnd_box.pkl"
    content = pickle.loads(truth.read_bytes())
    content["gnd"][0]["bbx"] = [500, 10, 600, 20]
    truth.write_bytes(pickle.dumps(content))

    right = builders.build_descriptor(load_cfg(None, overrides(SMALL_MODEL, GLOBAL_ONLY)))
    torch.save(right.state_dict(), folder / "good.pyth")
    (folder / "cut.pyth").write_bytes((folder / "good.pyth").read_bytes())
    cut_short(folder / "cut.pyth")
    basic = {"MODEL.DEPTH": 34, "RESNET.TRANS_FUN": "basic_transform", "MODEL.S3_DIM": 256, "MODEL.S4_DIM": 512}
    other = load_cfg(None, overrides(basic, GLOBAL_ONLY, {"MODEL.HEADS.IN_FEAT": 512}))
    torch.save(builders.build_descriptor(other).state_dict(), folder / "other.pyth")
    (folder / "harmful.pyth").write_bytes(pickle.dumps({"weight": Harmful()}))


def filled(value, folder: Path):
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_files(folder)
    return folder


def a_process(command: str, *args: str, cwd: Path) -> CompletedProcess:
    return python(ROOT / command, *args, cwd=cwd)


def here(command: str, *args: str, cwd: Path) -> CompletedProcess:
    """What `a_process` gives, by the command's `main` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        try:
            MAIN[command]([*args])
        except SystemExit as ending:
            code = ending.code or 0
        finally:
            setup_logging(None, quiet=True)
    return CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def ended(folder):
    """Name of a mistake -> how the command ended that made it. Each gets an OUT_DIR two levels below what is there."""

    def run(name: str, one: Mistake):
        where = {"DATA_LOADER.DATA_DIR": folder / "data", "INFER.DATA_DIR": folder / "data", "INFER.DATASETS": "toy"}
        where |= {"OUT_DIR": folder / "new" / "out", "TEST.WEIGHTS": folder / "good.pyth", "INFER.SCALES": "[1]"}
        if one.command != EVALUATE:  # its message names the folder, the others must not make it
            where["OUT_DIR"] = folder / name.replace(" ", "_") / "out"
        more = {key: filled(value, folder) for key, value in one.settings.items()}
        args = overrides(SMALL_MODEL, GLOBAL_ONLY, SMALL_TRAINING, {"OPTIM.MAX_EPOCH": 1}, where, more)
        start = a_process if name in IN_A_PROCESS else here
        return start(one.command, "--cfg", one.cfg, *args, *one.extra, cwd=folder)

    return {name: run(name, one) for name, one in MISTAKES.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_clear_line(name, ended, folder):
    process = ended[name]
    assert process.returncode == 2
    assert "Traceback" not in process.stderr + process.stdout
    (line,) = messages(process.stderr)
    first, *others = (filled(part, folder) for part in MISTAKES[name].said)
    assert line.startswith(f"error: {first}") and all(part in line for part in others), line


@pytest.mark.parametrize("name", sorted(MISTAKES.keys() - {AFTER_THE_QUERIES, *WHILE_TRAINING}))
def test_no_out_dir_is_left_behind(name, ended, folder):
    assert ended[name].returncode == 2
    made = folder / ("new" if MISTAKES[name].command == EVALUATE else name.replace(" ", "_"))
    assert not made.exists()


@pytest.mark.parametrize("name", WHILE_TRAINING)
def test_what_was_trained_before_a_mistake_was_met_is_kept(name, ended, folder):
    (newest,) = checkpoints(folder / name.replace(" ", "_") / "out")
    content = read_checkpoint(newest)
    assert content["iteration"] > 0 or content["epoch"] >= 0


def test_work_that_was_done_before_a_mistake_was_met_is_kept(ended, folder):
    assert ended[AFTER_THE_QUERIES].returncode == 2
    made = (folder / AFTER_THE_QUERIES.replace(" ", "_")).rglob("*")
    names = sorted(path.parent.name.split("-")[0] + "/" + path.name for path in made if path.is_file())
    assert names == ["queries.chunks/000000.chunk", "queries.chunks/plan.json"]


def test_nothing_in_a_users_file_is_executed(ended, folder):
    assert ended["initial weights that hold something else"].returncode == 2
    assert not (folder / "harm").exists()


def test_the_same_settings_without_a_mistake_do_train_extract_and_score(folder):
    """So that each mistake is the only one."""
    where = {"DATA_LOADER.DATA_DIR": folder / "data", "INFER.DATA_DIR": folder / "data", "INFER.DATASETS": "toy"}
    where |= {"OUT_DIR": folder / "right", "INFER.SCALES": "[1]", "OPTIM.MAX_EPOCH": 1}
    args = overrides(SMALL_MODEL, GLOBAL_ONLY, SMALL_TRAINING, where)
    for command in (TRAIN, INFER, EVALUATE):
        process = here(command, "--cfg", "good.yaml", *args, cwd=folder)
        assert process.returncode == 0 and messages(process.stderr) == [], process.stderr
