"""The starters are plain POSIX sh."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("*.sh"))
SHELL = shutil.which("dash") or shutil.which("sh")

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
