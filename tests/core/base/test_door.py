import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from core.base import door
from core.base.errors import entry_point
from tests.small_run import ROOT

DOORS = [
    "train.py",
    *(
        f"{path.parent.name}/{path.name}"
        for folder in ("datasets", "evaler", "scripts")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "core.base.door import run" in path.read_text(encoding="utf-8")
    ),
]


@pytest.mark.parametrize("path", DOORS)
def test_every_command_without_its_packages_says_so_in_one_line(path):
    """-I -S: an interpreter without site-packages."""
    code = f"import sys, runpy; sys.path.insert(0, ''); runpy.run_path({path!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: the package ") and " is not installed: " in ended.stderr


def test_a_package_that_does_not_work_here():
    broken = ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
    assert door.missing_package(broken).endswith("install the package opencv-python-headless in place of opencv-python")
    cuda = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
    assert door.missing_package(cuda).startswith("a package does not work here (libcudart.so.12: ")
    assert door.missing_package(ModuleNotFoundError("", name="faiss.swig")).startswith("the package faiss-gpu (or ")


def test_a_name_of_ours_that_cannot_be_imported_is_a_defect():
    for error in (
        ModuleNotFoundError("no module", name="core.absent"),
        ImportError("cannot import name 'x'", name="evaler"),
        OSError("the disk is gone"),
    ):
        assert door.missing_package(error) is None
    with pytest.raises(ImportError):
        door.run("core.absent")


def test_a_package_that_is_looked_for_later(capsys):
    @entry_point
    def main():
        import no_such_package.part  # noqa: F401

    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("error: the package no_such_package is not installed: ")


def test_an_old_python_says_so(monkeypatch, capsys):
    monkeypatch.setattr(door.sys, "version_info", (3, 8, 1))
    with pytest.raises(SystemExit) as raised:
        door.run("core.absent")
    assert raised.value.code == 2 and capsys.readouterr().err == "error: this is Python 3.8; 3.10 or newer is needed\n"


@pytest.mark.parametrize(("own", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(monkeypatch, own, found):
    """Unless the user says otherwise; read when a command's module is loaded, that is before PyTorch is."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    seen = []

    def load(name):
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        return SimpleNamespace(main=lambda: None)

    monkeypatch.setattr(door.importlib, "import_module", load)
    door.run("any")
    assert seen == [found]
