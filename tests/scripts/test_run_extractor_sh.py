"""run_extractor.sh finds an interpreter and hands over to evaler/extraction/shards.py, which is tested beside it."""

import pytest


def test_the_interpreter_and_all_arguments_are_handed_on(sandbox):
    result = sandbox.run("run_extractor.sh", "my config.yaml", "OUT_DIR", "an output")
    assert result.returncode == 0, result.stderr
    (call,) = sandbox.calls()
    assert call["args"] == [f"{sandbox.root}/scripts/run_extractor.py", "my config.yaml", "OUT_DIR", "an output"]
    assert call["cwd"] == str(sandbox.elsewhere)


@pytest.mark.parametrize("code", ["1", "2", "143"])
def test_its_exit_code_is_that_of_the_script(sandbox, code):
    assert sandbox.run("run_extractor.sh", "c.yaml", EXIT=code).returncode == int(code)


def test_without_a_configuration(sandbox):
    result = sandbox.run("run_extractor.sh")
    assert (result.returncode, sandbox.calls()) == (2, [])
    assert result.stderr.startswith("error: usage: [SHARDS=N] sh scripts/run_extractor.sh CFG")
