"""test.sh and the .venv that it makes, reuses, completes or makes anew."""

import os
import shutil
import signal
from pathlib import Path

import pytest


def test_the_first_run_makes_the_environment_and_the_second_reuses_it(sandbox):
    first = sandbox.run("test.sh", "-k", "two words")
    assert first.returncode == 0, first.stderr
    venv, pip, tests = sandbox.calls()
    assert venv["args"] == ["-m", "venv", str(sandbox.root / ".venv")]
    assert pip["args"][1:3] == ["pip", "install"]
    assert pip["args"][-4:] == ["-r", "requirements-cpu.txt", "-r", "requirements-dev.txt"]
    assert tests["args"] == ["-m", "pytest", "-k", "two words"]
    assert Path(tests["cwd"]).samefile(sandbox.root)
    sandbox.run("test.sh")
    (tests,) = sandbox.calls()
    assert tests["args"] == ["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def test_the_exit_code_is_that_of_the_tests(sandbox):
    assert sandbox.run("test.sh", EXIT="5").returncode == 5


def test_a_gpu_machine_gets_the_other_requirements_in_a_new_environment(sandbox):
    sandbox.run("test.sh")
    sandbox.calls()
    sandbox.gpus(2)
    assert "anew" in sandbox.run("test.sh").stdout
    calls = sandbox.calls()
    assert calls[0]["args"][1] == "venv"
    assert calls[1]["args"][-4:] == ["-r", "requirements.txt", "-r", "requirements-dev.txt"]
    sandbox.run("test.sh")
    assert sandbox.steps() == ["pytest"]


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-dev.txt"])
def test_changed_requirements_are_installed(sandbox, name):
    sandbox.run("test.sh")
    sandbox.calls()
    with open(sandbox.root / name, "a") as file:
        file.write("attrs\n")
    sandbox.run("test.sh")
    assert sandbox.steps() == ["pip", "pytest"]
    sandbox.run("test.sh")
    assert sandbox.steps() == ["pytest"]


def test_a_failed_installation_stops_and_is_made_anew(sandbox):
    failed = sandbox.run("test.sh", PIP_EXIT="1")
    assert failed.returncode == 2
    assert "could not install requirements-cpu.txt requirements-dev.txt" in failed.stderr
    assert sandbox.steps() == ["venv", "pip"]
    assert sandbox.run("test.sh").returncode == 0
    assert sandbox.steps() == ["venv", "pip", "pytest"]


def test_a_failed_change_is_made_anew_even_if_the_change_is_taken_back(sandbox):
    sandbox.run("test.sh")
    requirements = sandbox.root / "requirements-dev.txt"
    before = requirements.read_text()
    requirements.write_text("pytest<8\n")
    sandbox.run("test.sh", PIP_EXIT="1")
    sandbox.calls()
    requirements.write_text(before)
    sandbox.run("test.sh")
    assert sandbox.steps() == ["venv", "pip", "pytest"]


@pytest.mark.parametrize("step", ["venv", "pip"])
def test_an_installation_that_was_killed_is_made_anew(sandbox, step):
    process = sandbox.start("test.sh", **{f"{step.upper()}_SECONDS": "60"})
    python = sandbox.root / ".venv/bin/python"
    sandbox.wait_for(lambda: python.exists() and step in sandbox.calls_file.read_text(), step)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    sandbox.calls()
    again = sandbox.run("test.sh")
    assert again.returncode == 0
    assert "anew" in again.stdout
    assert sandbox.steps() == ["venv", "pip", "pytest"]


@pytest.mark.parametrize("damage", ["no python", "python fails", "a file"])
def test_a_broken_environment_is_made_anew(sandbox, damage):
    sandbox.run("test.sh")
    sandbox.calls()
    venv = sandbox.root / ".venv"
    if damage == "no python":
        (venv / "bin/python").unlink()
    elif damage == "python fails":
        (venv / "bin/broken").touch()
    else:
        shutil.rmtree(venv)
        venv.touch()
    assert sandbox.run("test.sh").returncode == 0
    assert sandbox.steps() == ["venv", "pip", "pytest"]


def test_two_runs_at_once_install_once(sandbox):
    processes = [sandbox.start("test.sh", PIP_SECONDS="0.5") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sorted(sandbox.steps()) == ["pip", "pytest", "pytest", "venv"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('case "$1" in -V) echo Python 3.9.7 ;; *) exit 1 ;; esac', "is Python 3.9.7; Python 3.10 or newer is needed"),
        ('case "$2" in *ensurepip*) exit 1 ;; print*) echo python ;; esac', "has no venv module"),
        ("exit 0", "is no Python"),
    ],
)
def test_an_unfit_python_gives_one_line(sandbox, body, said):
    sandbox.executable(sandbox.python, body)
    result = sandbox.run("test.sh")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not (sandbox.root / ".venv").exists()


def test_no_python_gives_one_line(sandbox):
    result = sandbox.run("test.sh", PYTHON="python3.99")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "python3.99 not found" in result.stderr
