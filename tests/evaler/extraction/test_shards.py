"""Shards as processes of one machine: their devices, their progress, their failures, their end. Without a network."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaler.extraction import shards as shard_processes
from evaler.extraction.shards import shard_count, visible_gpus
from tests.small_run import ROOT, child_environment, script

# Stands in for evaler/infer.py: notes how it was called, tells its progress, and ends as FAIL says.
INFER = (
    f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
"""
    + """
import os, time
keys = dict(zip(sys.argv[3::2], sys.argv[4::2]))
cut, total = keys["INFER.CUT_NUM"], keys["INFER.TOTAL_NUM"]
with open(os.path.join(keys["OUT_DIR"], f"call-{cut}"), "w") as file:
    print(os.getpid(), cut, total, os.environ["CUDA_VISIBLE_DEVICES"] or "-", keys.get("NUM_GPUS", "unset"), file=file)
pipe = int(os.environ["DOLG_PROGRESS_PIPE"])
print("weights: some", flush=True)
from core.base.progress import bar
list(bar(range(3), "joining", unit="chunk"))
for done in range(11):
    os.write(pipe, b"%d 10\\n" % done)
    time.sleep(float(os.environ.get("SECONDS_AN_IMAGE", "0")))
    if cut == os.environ.get("FAIL") and done == 4:
        if os.environ["HOW"] == "KILL":
            os.kill(os.getpid(), 9)
        print("error: a.jpg: truncated", file=sys.stderr)
        sys.exit(2)
print("toy: this shard is done; some chunks are still to come" if cut != total else "toy: descriptors are there")
"""
)
PROGRAM = """
import sys
from pathlib import Path
from evaler.extraction import shards as shard_processes
shard_processes.ROOT = Path(sys.argv[1])
shard_processes.main(sys.argv[2:])
"""


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "evaler").mkdir()
        (folder / "evaler" / "infer.py").write_text(INFER)
        (folder / "c.yaml").touch()
        self.program = script(folder, PROGRAM)

    def start(self, *more: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, str(self.program), str(self.folder), "c.yaml", "OUT_DIR", "out", *more]
        environment = child_environment() | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heed = lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)]  # noqa: E731
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, preexec_fn=heed, **pipes
        )

    def run(self, *more: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*more, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        return sorted(path.read_text().split() for path in self.out.glob("call-*"))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("named", "expected"),
    [("", []), ("0", ["0"]), ("5, 2", ["5", "2"]), ("GPU-7,-1,3", ["GPU-7"]), ("-1", []), ("1,,2", ["1", "2"])],
)
def test_the_gpus_of_cuda_visible_devices(monkeypatch, named, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("printf 'GPU 0: Card (GPU-0)\\n  MIG 1g Device 0: (MIG-0)\\nGPU 1: Card (UUID: 1)\\n'", ["0", "1"]),
        ("echo 'no driver'; exit 9", []),
        (None, []),
    ],
)
def test_the_gpus_that_nvidia_smi_lists(monkeypatch, tmp_path, says, expected):
    if says:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if says else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == expected


def test_how_many_shards(monkeypatch):
    monkeypatch.delenv("SHARDS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert [shard_count(3, 1), shard_count(0, 1), shard_count(0, 10 * cores)] == [3, cores, 1]
    monkeypatch.setenv("SHARDS", "7")
    assert shard_count(3, 1) == 7
    for wrong in ("0", "-1", "two", "01", "1.5"):
        monkeypatch.setenv("SHARDS", wrong)
        with pytest.raises(ValueError, match=rf"^SHARDS is {wrong}; it takes a whole number"):
            shard_count(0, 1)


def test_each_shard_has_its_part_and_its_device_and_all_are_shown_once(place):
    ended = place.run(SHARDS="3", CUDA_VISIBLE_DEVICES="5,2")
    assert ended.returncode == 0, ended.stderr
    assert sorted(call[1:] for call in place.calls()) == [
        [str(cut), "3", device, "unset"] for cut, device in ((1, "5"), (2, "2"), (3, "5"))
    ]
    assert ended.stdout == "weights: some\ntoy: descriptors are there\n"
    assert re.findall(r"(\d+)/(\d+)", ended.stderr)[-1] == ("30", "30")


def test_on_the_cpu(place):
    assert place.run("NUM_GPUS", "0", SHARDS="1", CUDA_VISIBLE_DEVICES="0").returncode == 0
    assert place.calls()[0][1:] == ["1", "1", "-", "0"]


@pytest.mark.parametrize(
    ("how", "told"),
    [("ERROR", "shard 2: exit code 2: error: a.jpg: truncated"), ("KILL", "shard 2: killed by SIGKILL: ")],
)
def test_a_shard_that_fails_is_reported_at_once_and_the_others_go_on(place, how, told):
    ended = place.run(SHARDS="3", FAIL="2", HOW=how, SECONDS_AN_IMAGE="0.02")
    assert ended.returncode == 1
    assert ended.stderr.count(told) == 2 and "; the others go on" in ended.stderr
    assert f"(all of it in {place.out.name}/logs/extract-2-of-3.log)" in ended.stderr
    assert ended.stderr.endswith("error: 1 of 3 shards failed; run this again to finish the rest\n")
    assert "toy: descriptors are there" in ended.stdout  # of shard 3


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.kill, signal.SIGHUP)],
    ids=["TERM", "Ctrl-C", "HUP"],
)
def test_a_signal_ends_the_shards(place, send, number):
    process = place.start(SHARDS="3", SECONDS_AN_IMAGE="5")
    deadline = time.monotonic() + 30
    while len(place.calls()) < 3 or not all(place.calls()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    pids = [int(call[0]) for call in place.calls()]
    assert all(map(running, pids))
    send(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "ended by a signal; run this again to go on" in err
    assert not any(map(running, pids))


def test_a_second_start_is_refused_while_the_first_is_at_work(place):
    first = place.start(SHARDS="1", SECONDS_AN_IMAGE="5")
    deadline = time.monotonic() + 30
    while not place.calls() or not place.calls()[0]:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    second = place.run(SHARDS="1")
    first.terminate()
    first.communicate(timeout=20)
    assert second.returncode == 2
    assert second.stderr == "error: out/logs is in use by another run: wait, or name another OUT_DIR\n"


def test_shards_end_when_the_process_that_started_them_is_killed(place):
    """Really: `Counter.add`, in place of the stand-in's own writing."""
    (place.folder / "evaler" / "infer.py").write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from core.base.progress import Counter\n"
        "open('out/call-1', 'w').write(f'{os.getpid()} ')\n"
        "with Counter('x', unit='image', total=100) as counter:\n"
        "    for _ in range(100): counter.add(1); time.sleep(0.6)\n"
    )
    process = place.start(SHARDS="1")
    deadline = time.monotonic() + 30
    while not place.calls() or not place.calls()[0]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (pid,) = (int(call[0]) for call in place.calls())
    process.kill()
    process.communicate()
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: "),
        (["c.yaml", "INFER.TOTAL_NUM", "2"], "sets INFER.TOTAL_NUM and INFER.CUT_NUM itself; use SHARDS=N"),
        (["c.yaml", "INFER.CUT_NUM", "1"], "use SHARDS=N"),
        (["absent.yaml"], "absent.yaml: no such configuration file"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").touch()
    with pytest.raises(SystemExit) as raised:
        shard_processes.main(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_images_that_are_not_there_are_told_of_once_and_nothing_is_started(place):
    done = place.run("INFER.IMAGES", "photos", SHARDS="3")
    assert done.returncode == 2
    assert done.stderr == "error: INFER.IMAGES photos: no such folder, list file or tar archive\n"
    assert not place.out.exists() and not place.calls()
