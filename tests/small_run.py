"""Tiny photographs, lists, settings and processes for tests that run the commands as a user does."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # these networks are too small to gain from more

# A ResNet-50 with a sixteenth of the width: all of its structure, little of its weight.
SMALL_MODEL = {
    "RESNET.WIDTH_PER_GROUP": 4,
    "RESNET.STRIDE_1X1": False,
    "MODEL.HEADS.REDUCTION_DIM": 8,
    "MODEL.HEADS.SCALE": 30,
    "MODEL.NUM_CLASSES": 3,
}
SMALL_TRAINING = {
    "NUM_GPUS": 0,
    "TRAIN.DATASET": "tiny",
    "TEST.DATASET": "tiny",
    "TRAIN.IM_SIZE": 32,
    "TEST.IM_SIZE": 36,
    "TRAIN.BATCH_SIZE": 4,
    "TEST.BATCH_SIZE": 3,
    "DATA_LOADER.NUM_WORKERS": 0,
    "OPTIM.BASE_LR": 0.05,
    "LOG_PERIOD": 1,
    "LOG_DEST": "stdout",
}

# The beginning of a script whose processes of one run are forked: they have at once what it has imported.
FORKING = """
import multiprocessing
from core.processes import launch
launch.mp = multiprocessing.get_context("fork")
launch.mp.get_context = lambda kind: launch.mp
"""
FORKING_DDP = "import torch._dynamo" + FORKING  # which DistributedDataParallel would load in every process


def overrides(*groups: dict) -> list[str]:
    """KEY VALUE ... of all groups, later ones winning."""
    merged = {key: value for group in groups for key, value in group.items()}
    return [str(part) for setting in merged.items() for part in setting]


def photograph(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """uint8 [height, width, 3], smooth and different for every seed."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 6, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def write_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def cut_short(path: Path) -> Path:
    """Leave the first two thirds of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def landmarks(data_dir: Path, *, name: str = "tiny", train: int = 10, val: int = 5, classes: int = 3) -> Path:
    """Write DATA_DIR/<name>: photographs, train_list.txt and val_list.txt; return DATA_DIR."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        lines = []
        for index in range(count):
            path = Path(split) / f"{index:02d}.jpg"
            write_image(data_dir / name / path, photograph(first + index, 40 + index, 52 - index))
            lines.append(f"{path} {index % classes}\n")
        (data_dir / name / f"{split}_list.txt").write_text("".join(lines))
    return data_dir


def retrieval_set(data_dir: Path, name: str = "toy", *, queries: int = 2, database: int = 5) -> Path:
    """Write DATA_DIR/<name> in the Revisited format, each query with a box within its picture; return DATA_DIR."""
    qimlist, imlist = [f"query{i}" for i in range(queries)], [f"image{i}" for i in range(database)]
    for seed, image in enumerate(qimlist + imlist):
        write_image(data_dir / name / "jpg" / f"{image}.jpg", photograph(seed, 50 + seed, 60 - seed))
    gnd = [
        {"bbx": [3.7, 2.2, 40.9, 44.1 + i], "easy": [i], "hard": [(i + 1) % database], "junk": []}
        for i in range(queries)
    ]
    content = pickle.dumps({"imlist": imlist, "qimlist": qimlist, "gnd": gnd}, protocol=2)
    (data_dir / name / f"gnd_{name}.pkl").write_bytes(content)
    return data_dir


def child_environment() -> dict[str, str]:
    """Of a child: one thread, and not a part of some run that the tests themselves were started in."""
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in distributed} | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def python(*args, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `python ARGS` from the folder `cwd` as a process of its own; its output is text."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=child_environment(), capture_output=True, text=True, timeout=timeout)


def script(folder: Path, source: str) -> Path:
    """Write a program to FOLDER/script.py."""
    path = folder / "script.py"
    path.write_text(source)
    return path


def start(path: Path, *args: str, **environment: str) -> subprocess.Popen:
    """Start a program that can import ours from anywhere, as a process of its own; its output is text."""
    env = child_environment() | {"PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(path), *args],
        cwd=path.parent,
        env=env,
        # A test run started in the background ignores SIGINT and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


def messages(stderr: str) -> list[str]:
    """The lines of `stderr` that are neither progress bars nor notes."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\||\d+it \[|^note: ", line)]
