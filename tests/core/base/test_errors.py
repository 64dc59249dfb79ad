import ast
import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.base import version
from core.base.errors import UserError, entry_point, is_user_error
from core.base.files import atomic_write, sha256_file
from core.base.version import code_version
from datasets import transforms
from tests.small_run import ROOT, child_environment, python

PACKAGES = ("core", "datasets", "evaler", "model", "revisitop", "scripts")


def caught(function) -> ValueError:
    with pytest.raises(ValueError) as raised:
        function()
    return raised.value


def refuse():
    raise UserError("one clear line")


def refuse_after_another_error():
    try:
        int("x")
    except ValueError:
        raise UserError("mended") from None


def from_numpy():
    """NumPy's C code leaves no frame in the traceback: the innermost one is this function's."""
    return np.zeros(3) + np.zeros(4)


def unmarked():
    raise ValueError("a defect of ours")


def from_python():
    return int("twelve")


def from_torch():
    return torch.nn.functional.batch_norm(torch.zeros(1, 2), None, None, training=True)


def test_a_marked_error_is_the_users_mistake():
    assert is_user_error(caught(refuse))
    assert is_user_error(caught(refuse_after_another_error))
    assert is_user_error(caught(lambda: transforms.scaled_size(3, 3, 0.1)))


@pytest.mark.parametrize("defect", [unmarked, from_numpy, from_python, from_torch])
def test_what_a_library_raises_and_what_is_not_marked_is_a_defect(defect):
    assert not is_user_error(caught(defect))


def test_other_types_and_errors_never_raised_are_no_mistakes_of_the_user():
    assert not is_user_error(ValueError("never raised"))
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("ours")
    assert not is_user_error(raised.value)


def test_a_mistake_stays_one_on_its_way_through_context_managers():
    @contextlib.contextmanager
    def manager():
        try:
            yield
        except ValueError:
            os.getpid()
            raise

    def through():
        with manager(), open(os.devnull):
            refuse()

    assert is_user_error(caught(through))


def test_no_mistake_of_a_user_is_a_plain_value_error():
    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Raise)
        and "ValueError" in (ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node.exc or node))
    ]
    assert len(files) > 100
    assert plain == []


def test_entry_point_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as raised:
        entry_point(refuse)()
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", "error: one clear line\n")


def test_entry_point_lets_defects_and_results_through():
    with pytest.raises(ValueError, match="could not be broadcast"):
        entry_point(from_numpy)()
    assert entry_point(lambda x, *, y: (x, y))(1, y=2) == (1, 2)


def test_entry_point_ends_quietly_when_interrupted(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as raised:
        entry_point(interrupted)()
    assert raised.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_entry_point_names_a_file_that_the_system_refuses(tmp_path, capsys):
    (tmp_path / "file").touch()

    def write():
        with atomic_write(tmp_path / "file" / "below"):
            pass

    with pytest.raises(SystemExit) as raised:
        entry_point(write)()
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


def test_entry_point_lets_other_system_errors_through():
    def connect():
        raise ConnectionResetError("peer")

    with pytest.raises(ConnectionResetError):
        entry_point(connect)()


def test_entry_point_ends_with_one_line_where_the_loss_is_not_finite(capsys):
    def diverge():
        raise FloatingPointError("the loss is nan")

    with pytest.raises(SystemExit) as raised:
        entry_point(diverge)()
    assert raised.value.code == 1 and capsys.readouterr().err == "error: the loss is nan\n"


def test_the_repository_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    code = "import sys; sys.path.insert(0, 'link'); from train import main; main(['--cfg', 'absent.yaml'])"
    ended = python("-c", code, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "error: absent.yaml: no such configuration file (see configs/)\n"


def test_atomic_write_leaves_the_whole_content_under_the_name_alone(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    with atomic_write(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b"whole")
    assert path.read_bytes() == b"halfwhole"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_atomic_write_keeps_the_old_content_when_the_new_one_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_write_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file"):
            pass
        assert os.umask(0o027) == 0o027  # it is as it was
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: calls.append(n) or f(*args))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]  # content, name, folder


def test_a_process_killed_while_writing_leaves_nothing_under_the_name(tmp_path):
    code = (
        "import sys, time\n"
        "from core.base.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 100000); file.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    path = tmp_path / "file"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    leftover = list(tmp_path.iterdir())
    assert [p.stat().st_size for p in leftover] == [100000] and leftover[0].name.endswith(".tmp")


def test_sha256_of_a_file_longer_than_a_block(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1_000_000)
    assert sha256_file(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    path.write_bytes(b"")
    assert sha256_file(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    path.write_bytes(b"a" * (1 << 20) + b"b")
    assert sha256_file(path) != sha256_file(Path(os.devnull))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that counts as the repository's root, and the function that runs git in it."""

    def git(*args: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "x")
    monkeypatch.setattr(version, "ROOT", tmp_path)
    code_version.cache_clear()
    yield tmp_path, git
    code_version.cache_clear()


def test_code_version_is_the_commit(checkout):
    _, git = checkout
    assert code_version() == git("rev-parse", "--short=12", "HEAD")


def test_code_version_tells_of_changes(checkout):
    folder, git = checkout
    (folder / "file").write_text("2")
    assert code_version() == git("rev-parse", "--short=12", "HEAD") + "-dirty"


def test_code_version_is_asked_for_once(checkout):
    folder, _ = checkout
    before = code_version()
    (folder / "file").write_text("2")
    assert code_version() == before


def test_code_version_does_not_follow_the_environment(checkout, tmp_path, tmp_path_factory, monkeypatch):
    """As inside a hook of another repository, or a shell with these variables."""
    _, git = checkout
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "clone", "-q", str(tmp_path), str(other)], check=True, capture_output=True)
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "y"], cwd=other, check=True)
    commit = git("rev-parse", "HEAD")
    for name, value in {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git" / "index",
        "GIT_COMMON_DIR": other / ".git",
        "GIT_OBJECT_DIRECTORY": other / ".git" / "objects",
        "GIT_CEILING_DIRECTORIES": tmp_path.parent,
        "GIT_NAMESPACE": "x",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, str(value))
            code_version.cache_clear()
            assert code_version() == commit[:12], name


def test_code_version_is_the_same_in_every_clone(checkout, tmp_path, tmp_path_factory, monkeypatch):
    """Tags, which a shallow clone lacks, do not show; nor does a work tree that is linked."""
    _, git = checkout
    git("tag", "-a", "-m", "t", "v1.0")
    git("commit", "-q", "--allow-empty", "-m", "y")
    for options in (["clone", "-q", "--depth=1", f"file://{tmp_path}"], ["-C", tmp_path, "worktree", "add", "-q"]):
        clone = tmp_path_factory.mktemp("clone") / "inner"
        subprocess.run(["git", *map(str, options), str(clone)], check=True, capture_output=True)
        monkeypatch.setattr(version, "ROOT", clone)
        code_version.cache_clear()
        assert code_version() == git("rev-parse", "HEAD")[:12]


def test_code_version_inside_a_repository_of_someone_else(checkout, tmp_path, monkeypatch):
    (tmp_path / "downloads" / "copy").mkdir(parents=True)
    monkeypatch.setattr(version, "ROOT", tmp_path / "downloads" / "copy")
    code_version.cache_clear()
    assert code_version() == "unknown"


def test_code_version_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code_version.cache_clear()
    assert code_version() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    code_version.cache_clear()
    assert code_version() == "unknown"
    code_version.cache_clear()


HOSTILE = "a\x1b]0;owned\x07\x9b2J\u202e\x7f.jpg"


def test_names_never_control_the_terminal(capsys):
    @entry_point
    def main():
        print("found", HOSTILE, end="\t|\n")
        print(f"note: {HOSTILE}", file=sys.stderr)
        raise UserError(f"{HOSTILE}\nerror: forged: a second line")

    with pytest.raises(SystemExit):
        main()
    escaped = r"a\x1b]0;owned\x07\x9b2J\u202e\x7f.jpg"
    out, err = capsys.readouterr()
    assert out == f"found {escaped}\t|\n"
    assert err == f"note: {escaped}\nerror: {escaped} error: forged: a second line\n"


def test_a_message_can_be_read_whatever_it_quotes(capsys):
    @entry_point
    def main():
        raise UserError(f"KEY {'9' * 100_000} is not one of: 1, 2")

    with pytest.raises(SystemExit):
        main()
    message = capsys.readouterr().err
    assert len(message) < 1600 and message.startswith("error: KEY 999") and message.endswith("9 is not one of: 1, 2\n")


def test_what_the_streams_were_comes_back_after_a_command(capsys):
    before = sys.stdout, sys.stderr
    errors = sys.stdout.errors
    entry_point(lambda: print("x"))()
    assert (sys.stdout, sys.stderr) == before and sys.stdout.errors == errors


def printing(text: str) -> list[str]:
    return ["-c", f"from core.base.errors import entry_point\nentry_point(lambda: print({text!r}))()"]


def test_a_letter_that_the_terminal_lacks_is_escaped():
    command, env = [sys.executable, *printing("故宫 \udcff.jpg")], child_environment() | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "\\u6545\\u5bab \\udcff.jpg\n")


def test_stdout_that_takes_no_more_ends_a_command_in_one_line_or_quietly():
    command = [sys.executable, *printing("x")]
    more = {"cwd": ROOT, "env": child_environment(), "stderr": subprocess.PIPE, "text": True, "timeout": 60}
    reading, writing = os.pipe()
    os.close(reading)
    gone = subprocess.run(command, stdout=writing, **more)
    os.close(writing)
    assert (gone.returncode, gone.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, **more)
    assert (ended.returncode, ended.stderr) == (2, "error: stdout: No space left on device\n")


def test_stderr_that_takes_no_more_stops_nothing():
    code = "import sys\nfrom core.base.errors import entry_point\n"
    code += "entry_point(lambda: (print('note', file=sys.stderr), print('done')))()"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=full)
    assert ended.stdout == b"done\n"
