"""run_extractor.sh: which shards it starts, where, with what, and how it ends."""

import os
import signal

import pytest


def shards(sandbox) -> list[tuple[str, str, str]]:
    """(CUT_NUM, TOTAL_NUM, device) of every shard, each checked to run infer.py with the user's settings."""
    found = []
    for call in sandbox.calls():
        program, option, cfg, *rest = call["args"]
        assert (program, option, cfg) == (str(sandbox.root / "evaler/infer.py"), "--cfg", "my config.yaml")
        assert rest[-2:] == ["OUT_DIR", "an output"]
        keys = dict(zip(rest[::2], rest[1::2], strict=True))
        assert keys.get("NUM_GPUS") == (None if call["device"] else "0")
        found.append((keys["INFER.CUT_NUM"], keys["INFER.TOTAL_NUM"], call["device"]))
    return sorted(found)


@pytest.mark.parametrize(
    ("gpus", "env", "expected"),
    [
        (0, {}, [("1", "1", "")]),
        (0, {"SHARDS": "3"}, [("1", "3", ""), ("2", "3", ""), ("3", "3", "")]),
        (3, {}, [("1", "3", "0"), ("2", "3", "1"), ("3", "3", "2")]),
        (2, {"SHARDS": "3"}, [("1", "3", "0"), ("2", "3", "1"), ("3", "3", "0")]),
        (3, {"SHARDS": "1"}, [("1", "1", "0")]),
        (8, {"CUDA_VISIBLE_DEVICES": "5, 2"}, [("1", "2", "5"), ("2", "2", "2")]),
        (8, {"CUDA_VISIBLE_DEVICES": "GPU-7,-1,3"}, [("1", "1", "GPU-7")]),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, [("1", "1", "")]),
        (8, {"CUDA_VISIBLE_DEVICES": "-1", "SHARDS": "2"}, [("1", "2", ""), ("2", "2", "")]),
    ],
)
def test_shards_and_their_devices(sandbox, gpus, env, expected):
    sandbox.gpus(gpus)
    result = sandbox.run("run_extractor.sh", "my config.yaml", "OUT_DIR", "an output", **env)
    assert result.returncode == 0, result.stderr
    assert shards(sandbox) == expected


def test_failed_shards_are_named_after_all_have_ended(sandbox):
    result = sandbox.run("run_extractor.sh", "c.yaml", SHARDS="4", FAILING="2 3", SHARD_SECONDS="0.1")
    assert result.returncode == 1
    assert result.stderr == "error: of 4 shards these failed: 2 (exit code 3) 3 (exit code 3)\n"
    assert len(sandbox.calls()) == 4


@pytest.mark.parametrize("number", ["0", "-1", "two", "01", "1.5"])
def test_a_wrong_number_of_shards_is_refused(sandbox, number):
    result = sandbox.run("run_extractor.sh", "c.yaml", SHARDS=number)
    assert (result.returncode, sandbox.calls()) == (2, [])
    assert f"SHARDS is {number}" in result.stderr


def test_the_shard_keys_belong_to_the_script(sandbox):
    result = sandbox.run("run_extractor.sh", "c.yaml", "INFER.TOTAL_NUM", "2")
    assert (result.returncode, sandbox.calls()) == (2, [])
    assert "SHARDS" in result.stderr


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("send", "number", "code"),
    [(os.kill, signal.SIGTERM, 143), (os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGHUP, 129)],
    ids=["TERM", "Ctrl-C", "HUP"],
)
def test_a_signal_ends_the_shards(sandbox, send, number, code):
    process = sandbox.start("run_extractor.sh", "c.yaml", SHARDS="3", SHARD_SECONDS="60")
    lines = sandbox.calls_file
    sandbox.wait_for(lambda: lines.exists() and lines.read_text().count("\036") == 3, "three shards")
    pids = [call["pid"] for call in sandbox.calls()]
    assert all(map(is_running, pids))
    send(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "ended by a signal" in err
    assert not any(map(is_running, pids))
