"""run_train.sh hands over to train.py; both runners say how they are used."""

import re
from pathlib import Path

import pytest


def test_train_gets_its_arguments_unchanged(sandbox):
    result = sandbox.run("run_train.sh", "my config.yaml", "OUT_DIR", "an output", "OPTIM.STEPS", "[0, 30]", EXIT="7")
    assert result.returncode == 7
    (call,) = sandbox.calls()
    train = str(sandbox.root / "train.py")
    assert call["args"] == [train, "--cfg", "my config.yaml", "OUT_DIR", "an output", "OPTIM.STEPS", "[0, 30]"]
    assert Path(call["cwd"]).samefile(sandbox.elsewhere)


def test_the_interpreter_is_the_one_of_venv_unless_it_is_unfinished(sandbox):
    sandbox.run("test.sh")
    sandbox.calls()
    del sandbox.env["PYTHON"]
    assert sandbox.run("run_train.sh", "c.yaml").returncode == 0
    assert len(sandbox.calls()) == 1
    (sandbox.root / ".venv/unfinished").touch()
    sandbox.executable(sandbox.bin / "python3", "exit 1")
    result = sandbox.run("run_train.sh", "c.yaml")
    assert result.returncode == 2
    assert "is no Python that runs" in result.stderr


@pytest.mark.parametrize("script", ["run_train.sh", "run_extractor.sh"])
def test_wrong_usage_gives_one_line(sandbox, script):
    result = sandbox.run(script)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: usage: .*sh scripts/{script} CFG .*\n", result.stderr)
    assert sandbox.calls() == []
