import signal
import subprocess
import sys

import pytest

from core.base.locks import InUse, folder_lock
from tests.small_run import ROOT, child_environment

HOLD = """
import os, sys, time
from core.base.locks import folder_lock
with folder_lock(sys.argv[1]) as locked:
    reading, writing = os.pipe()
    if os.fork() == 0:  # a loader worker, say, which outlives its parent
        os.write(writing, b".")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)  # on a busy machine it may not have begun to run when its parent is killed
    print(locked, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_dead_and_nothing_is_left(tmp_path):
    folder = tmp_path / "a" / "out"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "True\n"
            with pytest.raises(ValueError, match=f"^{folder} is in use by another run"), folder_lock(folder):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            with folder_lock(folder) as locked:
                assert locked
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(holder.pid)], check=False)
    assert list(folder.iterdir()) == []


def test_it_can_be_taken_again(tmp_path):
    for _ in range(2):
        with folder_lock(tmp_path) as locked:
            assert locked


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"file/out cannot be written: Not a directory"),
        folder_lock(tmp_path / "file" / "out"),
    ):
        pass


def test_many_share_it_and_one_may_have_it_alone(tmp_path):
    with folder_lock(tmp_path, shared=True), folder_lock(tmp_path, shared=True) as locked:
        assert locked
        with pytest.raises(InUse), folder_lock(tmp_path):
            pass
    with folder_lock(tmp_path), pytest.raises(InUse), folder_lock(tmp_path, shared=True):
        pass
