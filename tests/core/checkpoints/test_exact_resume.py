"""A run that is stopped anywhere and started again ends bit by bit where it would have ended anyway."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import checkpoint_path, checkpoints
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.processes.faults import Faults
from core.trainer import train
from tests.small_run import (
    FORKING_DDP,
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    child_environment,
    free_port,
    landmarks,
    overrides,
)

# Three epochs of three iterations; everything that has a state of its own is switched on.
SETTINGS = {
    "OPTIM.MAX_EPOCH": 3,
    "OPTIM.WARMUP_EPOCHS": 1,
    "OPTIM.LR_PER_ITER": True,
    "OPTIM.EMA_DECAY": 0.9,
    "MODEL.HEADS.CLS_LAYER": "curricularface",
    "BN.USE_PRECISE_STATS": True,
    "BN.NUM_SAMPLES_PRECISE": 8,
    "TRAIN.EVAL_PERIOD": 2,
    "LOG_PERIOD": 2,
}
TIMES = ("time_avg", "images_per_s", "eta", "mem")

# NUM_GPUS processes on the CPU.
TRAIN = """
import sys
from core.config import load_cfg
from core.base.errors import entry_point
from core.processes.launch import spawn
from core.checkpoints.output import output_folder
from core.trainer import train

@entry_point
def main():
    cfg, world = load_cfg(None, sys.argv[2:]), int(sys.argv[1])
    with output_folder(cfg):
        spawn(train, cfg, world) if world > 1 else train(cfg)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return landmarks(tmp_path_factory.mktemp("data"), train=13, val=5)


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    setup_logging(None, quiet=True)


def settings(data_dir: Path, out_dir: Path, **more) -> list[str]:
    place = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": out_dir}
    return overrides(SMALL_MODEL, SMALL_TRAINING, SETTINGS, place, more)


def numbers(lines: list[str]) -> list[dict]:
    """What a run has measured, but for times."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_stats(lines)]


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two checkpoints differ in a bit, apart from settings and the version of the code."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [d for key in a if key not in ("cfg", "code") for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b or a != a else [f"{where}: {a} {b}"]


def assert_same(first: Path, second: Path) -> None:
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    assert differences(a, b) == []
    assert len(a["model_state"]) > 300 and len(a["ema_state"]) == len(a["model_state"])


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """An uninterrupted run that has kept a checkpoint of every position, and what it said."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    log = {"LOG_DEST": "file", "TRAIN.CHECKPOINT_ITERS": 1, "TRAIN.KEEP_CHECKPOINTS": 99}
    train(load_cfg(None, settings(data_dir, out_dir, **log)))
    return out_dir, (out_dir / "stdout.log").read_text().splitlines()


def test_the_run_to_compare_with_has_every_position(whole):
    out_dir, lines = whole
    places = [(e, i) for e in range(4) for i in range(3) if (e, i) != (0, 0) and (e < 3 or i == 0)]
    assert checkpoints(out_dir) == [checkpoint_path(out_dir, *place) for place in places]
    kinds = [record["_type"] for record in numbers(lines)]
    epoch = ["train_iter", "train_iter", "train_epoch"]
    assert kinds == [*epoch, *epoch, "test_epoch", *epoch, "test_epoch"]


@pytest.mark.parametrize(
    ("place", "workers", "already"),
    [((0, 2), 0, 1), ((1, 0), 2, 3), ((1, 1), 0, 3), ((1, 2), 2, 4), ((2, 0), 0, 7), ((2, 1), 2, 7)],
)
def test_from_any_position_on(data_dir, tmp_path, whole, place, workers, already, capsys):
    """Before, at and after the boundaries of epochs, and in the middle of a log period."""
    out_dir, lines = tmp_path / "out", whole[1]
    start = checkpoint_path(out_dir, *place)
    start.parent.mkdir(parents=True)
    shutil.copy(checkpoint_path(whole[0], *place), start)
    more = {"DATA_LOADER.NUM_WORKERS": workers, "TRAIN.KEEP_CHECKPOINTS": 1}
    train(load_cfg(None, settings(data_dir, out_dir, **more)))
    assert numbers(capsys.readouterr().out.splitlines()) == numbers(lines)[already:]
    assert_same(checkpoint_path(out_dir, 3), checkpoint_path(whole[0], 3))
    assert checkpoints(out_dir) == [checkpoint_path(out_dir, 3)]


def stop_at_poll(monkeypatch, count: int, number: int) -> None:
    """Send this process a signal when it asks for one for the `count`-th time."""
    calls, poll = [], Faults.poll

    def counted(self):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        poll(self)

    monkeypatch.setattr(Faults, "poll", counted)


def stopped_and_resumed(data_dir, out_dir, monkeypatch, count: int) -> None:
    """Stop in this process at a poll, then go on to the end."""
    number = (signal.SIGINT, signal.SIGTERM)[count % 2]
    args = settings(data_dir, out_dir, **{"TRAIN.KEEP_CHECKPOINTS": 1})
    with monkeypatch.context() as patch:
        stop_at_poll(patch, count, number)
        with pytest.raises(SystemExit) as stopped:
            train(load_cfg(None, args))
        assert stopped.value.code == 128 + number
    assert len(checkpoints(out_dir)) == 1
    train(load_cfg(None, args))


@pytest.mark.parametrize("count", [1, 5, 11], ids=["step", "statistics", "validation"])
def test_stopped_in_a_step_in_batch_norm_statistics_and_in_validation(
    data_dir, tmp_path, whole, monkeypatch, capsys, count
):
    """At the first step; between the two batches of statistics after epoch 1; and after epoch 2, in validation."""
    stopped_and_resumed(data_dir, tmp_path / "out", monkeypatch, count)
    assert numbers(capsys.readouterr().out.splitlines()) == numbers(whole[1])
    assert_same(checkpoint_path(tmp_path / "out", 3), checkpoint_path(whole[0], 3))


@pytest.mark.soak
def test_stopped_at_every_poll_of_a_run(data_dir, tmp_path, whole, monkeypatch):
    count, differing = 0, 0
    while True:
        count += 1
        try:
            stopped_and_resumed(data_dir, tmp_path / str(count), monkeypatch, count)
        except pytest.fail.Exception:  # the run has no such poll: it has ended
            break
        a, b = (torch.load(checkpoint_path(f, 3), weights_only=True) for f in (tmp_path / str(count), whole[0]))
        differing += differences(a, b) != []
    print(f"\nstopped at each of {count - 1} points: {differing} end with other bits")
    assert count > 15 and differing == 0


class Runner:
    """Runs the same training in processes of its own, stopped again and again."""

    def __init__(self, folder: Path, world: int, args: list[str]):
        self.log, self.world = folder / "log", world
        script = folder / "train.py"
        script.write_text(FORKING_DDP + TRAIN if world > 1 else TRAIN)
        self.command = [sys.executable, str(script), str(world), *args]
        self.environment = child_environment() | {"PYTHONPATH": str(ROOT)}

    def start(self) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*self.command, "PORT", str(free_port())],
                cwd=self.log.parent,
                env=self.environment,
                stdout=log,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                # A test run started in the background ignores SIGINT and would hand that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def stop_after(self, count: int, number: int) -> tuple[int, str]:
        """Send a signal when so many lines of json_stats are there; return the exit code and stderr."""
        process = self.start()
        deadline = time.monotonic() + 280
        while len(read_stats(self.lines())) < count and process.poll() is None:
            assert time.monotonic() < deadline, "it is too slow on this machine, or hangs"
            time.sleep(0.002)
        os.killpg(process.pid, number)
        began = time.monotonic()
        _, err = process.communicate(timeout=100)
        assert time.monotonic() - began < 30
        assert "Traceback" not in err, err
        return process.returncode, err


@pytest.mark.parametrize(("world", "workers", "number", "after"), [(1, 2, signal.SIGINT, 4), (2, 2, signal.SIGTERM, 1)])
def test_stopped_by_a_signal_and_started_again(data_dir, tmp_path, whole, world, workers, number, after):
    """Real processes; signals to all of the group at once, as from a terminal or SLURM: loader workers get them too."""
    (tmp_path / "b").mkdir()
    epochs = 3 if world == 1 else 2
    more = {"DATA_LOADER.NUM_WORKERS": workers, "TRAIN.KEEP_CHECKPOINTS": 1, "OPTIM.MAX_EPOCH": epochs}
    stopped = Runner(tmp_path / "b", world, settings(data_dir, tmp_path / "b" / "out", **more))
    if world > 1:
        (tmp_path / "a").mkdir()
        more["DATA_LOADER.NUM_WORKERS"] = 0
        through = Runner(tmp_path / "a", world, settings(data_dir, tmp_path / "a" / "out", **more))
    code, err = stopped.stop_after(after, number)
    assert code == 128 + number, err
    [last] = checkpoints(tmp_path / "b" / "out")
    assert f"{number.name}: the same command goes on from {last}" in stopped.lines()[-1], err
    assert torch.load(last, weights_only=True)["epoch"] < epochs - 1
    ended = stopped.start()
    _, err = ended.communicate(timeout=100)
    assert ended.returncode == 0, err
    expected, lines = whole
    if world > 1:
        reference = through.start()
        _, err = reference.communicate(timeout=100)
        assert reference.returncode == 0, err
        expected, lines = tmp_path / "a" / "out", through.lines()
    assert_same(checkpoint_path(expected, epochs), checkpoint_path(tmp_path / "b" / "out", epochs))
    assert numbers(stopped.lines()) == numbers(lines)


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_stopped_at_random_again_and_again(data_dir, tmp_path, world):
    """SIGINT, SIGTERM and SIGKILL at random moments; in the end the bits of the uninterrupted run."""
    generator = torch.Generator().manual_seed(world)
    more = {"OPTIM.MAX_EPOCH": 12, "TRAIN.CHECKPOINT_ITERS": 1, "TRAIN.KEEP_CHECKPOINTS": 2}
    (tmp_path / "whole").mkdir()
    through = Runner(tmp_path / "whole", world, settings(data_dir, tmp_path / "whole" / "out", **more))
    reference = through.start()
    _, err = reference.communicate(timeout=300)
    assert reference.returncode == 0, err
    differing, stops = 0, 0
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        runner = Runner(folder, world, settings(data_dir, folder / "out", **more))
        while True:
            process = runner.start()
            wait = 2.0 + 5.0 * torch.rand((), generator=generator).item()
            try:
                _, err = process.communicate(timeout=wait)
                assert process.returncode == 0, err
                break
            except subprocess.TimeoutExpired:
                number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[stops % 3]
                stops += 1
                os.kill(process.pid, number)
                process.communicate(timeout=60)
        a, b = (torch.load(checkpoint_path(f / "out", 12), weights_only=True) for f in (tmp_path / "whole", folder))
        found = differences(a, b)
        differing += found != []
        print(f"\nrun {attempt}: {len(found)} differences {found[:5]}")
    print(f"\n{stops} stops over 5 runs of {world} process(es): {differing} end with other bits")
    assert stops >= 10 and differing == 0
