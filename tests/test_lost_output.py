"""Output that cannot be written (a full disk, a reader that is gone, closed streams) costs no work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from core.base.errors import entry_point
from core.base.terminal import work_goes_on
from core.checkpoints.checkpoint import checkpoints
from core.logging import read_stats, setup_logging
from evaler.extraction import command as extract
from tests.small_run import (
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    child_environment,
    cut_short,
    free_port,
    landmarks,
    overrides,
    retrieval_set,
    script,
)

FULL = "stdout cannot be written (No space left on device); what it does not take is left out"


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    setup_logging(None, quiet=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Ten photographs; the name of a broken one is in Chinese."""
    folder = landmarks(tmp_path_factory.mktemp("data"), train=10, val=3)
    images = folder / "tiny"
    cut_short(images / "train" / "03.jpg").rename(images / "train" / "故宫.jpg")
    listed = images / "train_list.txt"
    listed.write_text(listed.read_text().replace("03.jpg", "故宫.jpg"), encoding="utf-8")
    return folder


def settings(data_dir: Path, out_dir: Path, **more) -> list[str]:
    common = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": out_dir, "LOG_DEST": "both", "DATA_LOADER.SKIP_BROKEN": 1}
    (out_dir.parent / "empty.yaml").touch()
    return [
        "--cfg",
        str(out_dir.parent / "empty.yaml"),
        *overrides(SMALL_MODEL, SMALL_TRAINING, common, {"OPTIM.MAX_EPOCH": 1, "TEST.SPLIT": ""}, more),
    ]


def check_complete(out_dir: Path) -> str:
    """The checkpoint of the last epoch is there and the log is complete; returns the log."""
    assert [path.name for path in checkpoints(out_dir)][-1] == "model_epoch_0001.pyth"
    text = (out_dir / "stdout.log").read_text(encoding="utf-8")
    kinds = [record["_type"] for record in read_stats(text.splitlines())]
    assert kinds == ["train_iter", "train_iter", "train_epoch"] and "saved " in text and "故宫.jpg" in text
    return text


def test_training_goes_on_on_full_disks(data_dir, tmp_path, monkeypatch):
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        train.main(settings(data_dir, tmp_path / "out"))
        monkeypatch.undo()
    text = check_complete(tmp_path / "out")
    assert text.count(FULL) == 1 and text.count(FULL.replace("stdout", "stderr")) == 1


def test_training_goes_on_with_a_full_disk_under_its_log(data_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stdout.log").symlink_to("/dev/full")
    train.main(settings(data_dir, tmp_path / "out"))
    out, err = capsys.readouterr()
    assert checkpoints(tmp_path / "out") and "epoch 1/1 trained: " in out
    assert err.count("stdout.log cannot be written (No space left on device); training goes on") == 1


def test_two_processes_go_on_when_the_reader_is_gone_and_the_terminal_is_ascii(data_dir, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    source = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.test_lost_output import two_processes
if __name__ == "__main__":
    two_processes()
"""
    arguments = settings(data_dir, tmp_path / "out", PORT=free_port(), DIST_TIMEOUT=60)
    command = [sys.executable, str(script(tmp_path, source)), *arguments]
    env = child_environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    ended = subprocess.run(command, env=env, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert ended.returncode == 0, ended.stderr
    broken_pipe = FULL.replace("No space left on device", "Broken pipe")
    assert ended.stderr.count(broken_pipe) == 1 and "Traceback" not in ended.stderr
    assert check_complete(tmp_path / "out").count(broken_pipe) == 1


def two_processes() -> None:
    from core.arguments import load_cfg_from_args
    from core.processes.launch import spawn
    from core.trainer import train as train_one

    entry_point(lambda: spawn(train_one, load_cfg_from_args("Train."), 2))()


def test_extraction_goes_on_on_a_full_disk(tmp_path, monkeypatch, capsys):
    data = retrieval_set(tmp_path / "data")
    common = {"INFER.DATA_DIR": data, "INFER.DATASETS": "toy", "INFER.SCALES": [1.0], "OPTIM.MAX_EPOCH": 0}
    arguments = settings(landmarks(tmp_path / "data"), tmp_path / "out", **common)
    train.main(arguments)
    capsys.readouterr()
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        extract.main(arguments)
        monkeypatch.undo()
    assert capsys.readouterr().err.count(f"note: {FULL}\n") == 1
    assert len(list((tmp_path / "out" / "features" / "toy").glob("*.npy"))) == 2


CLOSED = """
import sys; sys.path.insert(0, {root!r})
from core.base.errors import entry_point
from core.base.terminal import work_goes_on

@entry_point
def main():
    {first}
    with open("made.txt", "w") as file:
        assert file.fileno() > 2, "a file in the place of a stream"
        for number in range(5000):
            print("line", number)
            print("line", number, file=sys.stderr)
        file.write("done")

main()
"""


@pytest.mark.parametrize(
    ("streams", "code"), [(">/dev/full", 2), ("| head -1", 141), (">&-", 2), ("2>&-", 0), (">&- 2>&- <&-", 2)]
)
@pytest.mark.parametrize("working", [False, True])
def test_a_command_does_its_work_whatever_becomes_of_its_streams(tmp_path, streams, code, working):
    """A command whose files count ends with 0; of another the exit code tells that its output is not complete."""
    first = "work_goes_on()" if working else "pass"
    (tmp_path / "script.py").write_text(CLOSED.format(root=str(ROOT), first=first))
    line = f"set -o pipefail; {sys.executable} script.py {streams}"
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == (0 if working else code)
    assert (tmp_path / "made.txt").read_text() == "done"
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    notes = [text for text in ended.stderr.splitlines() if not text.startswith("line ")]
    silent = "2>&-" in streams or (streams == "| head -1" and not working)
    assert len(notes) == (0 if silent else 1), notes


def test_a_signal_that_speaks_while_something_is_printed_ends_nothing(capsys, monkeypatch):
    """Python refuses to write into a stream from a signal's handler that interrupted a write into it."""

    def write(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys.stderr, "write", write)
    assert entry_point(lambda: (work_goes_on(print), print("x", file=sys.stderr), 3))()[-1] == 3
    assert capsys.readouterr().out.startswith("stderr cannot be written (reentrant call")
