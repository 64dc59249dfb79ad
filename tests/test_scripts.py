"""The starters in scripts/: plain POSIX sh, run for real with a recording stand-in for the Python interpreter."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
SHELL = shutil.which("dash") or shutil.which("sh")

# Stands in for python3, for .venv's python and so for pip, pytest, train.py and infer.py: notes how it was called, as
# fields that end in the unit separator and calls that end in the record separator. In sh, since it runs often.
STAND_IN = r"""
case "$1 $2" in
"-c "*fcntl*) exec REAL_PYTHON "$@" ;;
"-c import pip"*) [ ! -e "${0%/*}/broken" ]; exit ;;
"-c "*) exit 0 ;;
esac
printf '%s\037' "$$" "$PWD" "${CUDA_VISIBLE_DEVICES-unset}" "$@" | { cat; printf '\036'; } >"$CALLS.$$"
cat "$CALLS.$$" >>"$CALLS"
rm "$CALLS.$$"
case "$1 $2" in
"-m venv") mkdir "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
"-m pip") sleep "${PIP_SECONDS:-0}"; exit "${PIP_EXIT:-0}" ;;
*/evaler/infer.py*)
    for word in ${FAILING:-}; do case " $* " in *" INFER.CUT_NUM $word "*) exit 3 ;; esac; done
    exec sleep "${SHARD_SECONDS:-0}" ;;
esac
exit "${EXIT:-0}"
"""


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
            # A test run started in the background ignores SIGINT and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

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


# ------------------------------------------------------------------------------------------------------ POSIX shell

BASHISMS = {
    "[[": r"\[\[",
    "==": r"\[ [^\]]*==",
    "function": r"^\s*function\s",
    "let": r"^\s*let\s",
    "local": r"^\s*(local|declare|typeset)\s",
    "source": r"^\s*source\s",
    "array": r"\w\+?=\(",
    "here-string": r"<<<",
    "&>": r"&>",
    "process substitution": r"[<>]\(",
    "$'...'": r"\$'",
    "((...))": r"(^|[^$(])\(\(",
    "++": r"\$\(\(.*(\+\+|--)",
    "substring": r"\$\{\w+:\d",
    "replacement": r"\$\{\w+/",
    "pipefail": r"pipefail",
    "echo -e": r"echo -[en]",
    "bash variable": r"\$\{?(BASH|RANDOM|EUID|UID|FUNCNAME|PIPESTATUS)",
    "{a..b}": r"\{\w+\.\.\w+\}",
}


def bashisms(text: str) -> list[str]:
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    hits = ((i, name) for i, line in enumerate(lines, 1) for name, what in BASHISMS.items() if re.search(what, line))
    return [f"{i}: {name}" for i, name in hits]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_posix_sh(script):
    checked = subprocess.run([SHELL, "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert bashisms(script.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "if [[ -n $x ]]; then",
        'if [ "$x" == y ]; then',
        "function f {",
        "  let i=i+1",
        "  local x=1",
        "source x.sh",
        "a=(1 2)",
        "a+=(1)",
        'cat <<< "$x"',
        "cmd &> log",
        "diff <(a) <(b)",
        "x=$'\\n'",
        "((i > 1)) && x",
        "i=$((i++))",
        "echo ${x:1}",
        "echo ${x/a/b}",
        "set -o pipefail",
        "echo -e x",
        'cd "${BASH_SOURCE[0]}"',
        "for i in {1..3}; do",
    ],
)
def test_the_search_for_bashisms_finds_them(line):
    assert bashisms(line) != []


# ------------------------------------------------------------------------------------------- test.sh and its .venv


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
    assert sandbox.steps() == ["pytest"]


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


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.01)


def test_an_installation_that_was_killed_is_made_anew(sandbox):
    process = sandbox.start("test.sh", PIP_SECONDS="60")
    wait_for(lambda: sandbox.calls_file.exists() and "pip" in sandbox.calls_file.read_text(), "pip")
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
        ('case "$2" in *ensurepip*) exit 1 ;; esac', "has no venv module"),
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


# -------------------------------------------------------------------------------------------------- run_train.sh


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
    assert "lacks the packages" in result.stderr


@pytest.mark.parametrize("script", ["run_train.sh", "run_extractor.sh"])
def test_wrong_usage_gives_one_line(sandbox, script):
    result = sandbox.run(script)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: usage: .*sh scripts/{script} CFG .*\n", result.stderr)
    assert sandbox.calls() == []


# ---------------------------------------------------------------------------------------------- run_extractor.sh


def shards(sandbox: Sandbox) -> list[tuple[str, str, str]]:
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
    wait_for(lambda: lines.exists() and lines.read_text().count("\036") == 3, "three shards")
    pids = [call["pid"] for call in sandbox.calls()]
    assert all(map(is_running, pids))
    send(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "ended by a signal" in err
    assert not any(map(is_running, pids))


# ------------------------------------------------------------------------------------------ download_pretrained.sh


@pytest.fixture
def downloader(sandbox, file_server):
    """The sandbox with the real interpreter and download code, and a server in place of the published address."""
    (sandbox.root / "core").mkdir()
    for name in ("__init__.py", "download.py", "environment.py"):
        shutil.copy(ROOT / "core" / name, sandbox.root / "core")
    sandbox.env |= {"PYTHON": sys.executable, "PYCLS_BASE_URL": file_server.url, "no_proxy": "127.0.0.1"}
    return sandbox


R50 = "/161235311/R-50-1x64d_dds_8gpu.pyth"
R101 = "/161167170/R-101-1x64d_dds_8gpu.pyth"


def test_weights_arrive_after_an_interrupted_download(downloader, file_server):
    file_server.files = {R50: b"five" * 50_000, R101: b"one" * 50_000}
    file_server.break_after = 70_000
    broken = downloader.run("download_pretrained.sh")
    assert broken.returncode == 2
    assert f"error: {file_server.url}{R50}: the connection ended after 70000 of 200000 bytes" in broken.stderr
    folder = downloader.root / "pretrained"
    assert not (folder / R50.split("/")[-1]).exists()

    file_server.break_after = None
    whole = downloader.run("download_pretrained.sh")
    assert whole.returncode == 0, whole.stderr
    assert file_server.asked == [(R50, None), (R50, "bytes=70000-"), (R101, None)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "R-50-1x64d_dds_8gpu.pyth": b"five" * 50_000,
        "R-101-1x64d_dds_8gpu.pyth": b"one" * 50_000,
    }
    assert downloader.run("download_pretrained.sh", "R-101").returncode == 0
    assert len(file_server.asked) == 3


def test_every_published_name_leads_to_its_file(downloader, file_server):
    published = {
        "R-50": R50,
        "R-101": R101,
        "R-152": "/161167467/R-152-1x64d_dds_8gpu.pyth",
        "X-50": "/161167411/X-50-32x4d_dds_8gpu.pyth",
        "X-101": "/161167590/X-101-32x4d_dds_8gpu.pyth",
    }
    file_server.files = {path: name.encode() for name, path in published.items()}
    assert downloader.run("download_pretrained.sh", *published).returncode == 0
    for name, path in published.items():
        assert (downloader.root / "pretrained" / path.split("/")[-1]).read_bytes() == name.encode()
    known = (ROOT / "pretrained/README.md").read_text()
    assert all(path in known for path in published.values())


def test_an_unknown_name_stops_before_any_download(downloader, file_server):
    result = downloader.run("download_pretrained.sh", "R-50", "R-18")
    assert result.returncode == 2
    assert result.stderr == "error: unknown weights R-18; known are R-50 R-101 R-152 X-50 X-101\n"
    assert file_server.asked == []
