"""A place to run the starters of scripts/ for real, with a recording stand-in for the Python interpreter."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("dash") or shutil.which("sh")

# Stands in for python3, for .venv's python and so for pip, pytest, train.py and infer.py: notes how it was called, as
# fields that end in the unit separator and calls that end in the record separator. In sh, since it runs often.
STAND_IN = r"""
case "$1 $2" in
"-c "*fcntl*) exec REAL_PYTHON "$@" ;;
"-c import pip"*) [ ! -e "${0%/*}/broken" ]; exit ;;
"-c print("*) echo python; exit ;;
"-c "*) exit 0 ;;
esac
printf '%s\037' "$$" "$PWD" "${CUDA_VISIBLE_DEVICES-unset}" "$@" | { cat; printf '\036'; } >"$CALLS.$$"
cat "$CALLS.$$" >>"$CALLS"
rm "$CALLS.$$"
case "$1 $2" in
"-m venv") mkdir "$3/bin" && cp "$0" "$3/bin/python"; sleep "${VENV_SECONDS:-0}"; exit ;;
"-m pip") sleep "${PIP_SECONDS:-0}"; exit "${PIP_EXIT:-0}" ;;
*/evaler/infer.py*)
    for word in ${FAILING:-}; do case " $* " in *" INFER.CUT_NUM $word "*) exit 3 ;; esac; done
    exec sleep "${SHARD_SECONDS:-0}" ;;
esac
exit "${EXIT:-0}"
"""


def _heed_signals() -> None:
    """A test run started in the background, or by nohup, ignores these and would hand that on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Sandbox:
    """A repository in a folder with blanks in its name that holds only the starters, and a machine without GPU."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.elsewhere = folder / "elsewhere"
        self.calls_file = folder / "calls"
        self.bin = folder / "bin"
        for made in (self.elsewhere, self.bin):
            made.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for requirements in ROOT.glob("requirements*.txt"):
            shutil.copy(requirements, self.root)
        self.python = self.bin / "my python"
        self.executable(self.python, STAND_IN.replace("REAL_PYTHON", shlex.quote(sys.executable)))
        self.gpus(0)
        taken = ("PYTHON", "SHARDS", "CUDA_VISIBLE_DEVICES", "CALLS", "PYCLS_BASE_URL")
        self.env = {name: value for name, value in os.environ.items() if name not in taken}
        self.env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls_file)}
        self.env["PYTHON"] = str(self.python)

    @staticmethod
    def executable(path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def gpus(self, count: int) -> None:
        listed = "".join(f"GPU {i}: Card (UUID: GPU-{i})\n  MIG 1g Device 0: (UUID: MIG-{i})\n" for i in range(count))
        self.executable(self.bin / "nvidia-smi", f"printf '{listed}'" if count else "echo 'no driver'; exit 9")

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SHELL, str(self.root / "scripts" / script), *arguments],
            cwd=self.elsewhere,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_signals,
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @staticmethod
    def wait_for(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"still waiting for {what}"
            time.sleep(0.01)

    def calls(self) -> list[dict]:
        """How the stand-in was called since the last time this was asked."""
        if not self.calls_file.exists():
            return []
        calls = [record.split("\037")[:-1] for record in self.calls_file.read_text().split("\036")[:-1]]
        self.calls_file.unlink()
        return [{"pid": int(pid), "cwd": cwd, "device": device, "args": args} for pid, cwd, device, *args in calls]

    def steps(self) -> list[str]:
        """The same as words: venv, pip, pytest, ..."""
        return [call["args"][1] for call in self.calls() if call["args"][0] == "-m"]


@pytest.fixture
def sandbox(tmp_path) -> Sandbox:
    return Sandbox(tmp_path)
