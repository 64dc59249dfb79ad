"""Processes that are started again and again at one store, as torchrun's are: those that live find each other."""

import json
import subprocess
import sys

from tests.small_run import ROOT, child_environment, script

ROUNDS = """
import datetime, json, os, sys, time
import torch.distributed as dist
from core.processes import launch
from core.processes import meeting
from core.config import load_cfg
from core.processes.distributed import all_reduce_sum
from core.base.errors import entry_point
from core.processes.place import Place

cfg = load_cfg(None, ["NUM_GPUS", "0", "DIST_TIMEOUT", "100", "TRAIN.BATCH_SIZE", "6"])
agents = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
world = 3

def dead(here, moment):
    if moment == "before it came":
        os._exit(9)
    store = meeting.open_store(here, datetime.timedelta(seconds=100))
    store.set(f"dolg/name/{here.rank}", f"dead at {moment}")
    if moment == "when it had said its name":
        os._exit(9)
    meeting.meet(store, here, datetime.timedelta(seconds=100))
    if moment == "when all had met":
        os._exit(9)

def mistaken(cfg):
    if dist.get_rank() == 1:
        load_cfg(None, ["NUM_GPUS", "many"])
    dist.barrier()

def working(cfg):
    total = all_reduce_sum(launch.torch.ones(1)).item()
    line = f"{total:.0f} processes, started {launch.restarts()} times before\\n"
    os.write(1, line.encode())  # at once: those of three processes would mix

@entry_point
def process(rank, moment):
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": agents.port}
    more = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
    os.environ.update({key: str(value) for key, value in (place | more).items()})
    if rank == 1 and moment and moment != "mistake":
        dead(Place(rank, world, rank), moment)
    with meeting.told_once():
        launch.launch(mistaken if moment == "mistake" else working, cfg)

def forked(rank, moment):
    pid = os.fork()
    if pid:
        return pid
    if moment == "mistake":
        os.dup2(1, 2)
    code = 1
    try:
        process(rank, moment)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)

for moment in sys.argv[1].split(","):  # after a failure an agent ends the others and starts all again
    running, codes = {forked(rank, moment): rank for rank in range(world)}, {}
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if codes and 9 in codes.values():
            for pid in running:
                os.kill(pid, 15)
    print("codes", [codes[rank] for rank in range(world)], flush=True)
"""
MOMENTS = ("when it had said its name", "when all had met", "before it came")


def test_the_living_find_each_other_and_a_mistake_is_told_once(tmp_path):
    rounds = [*MOMENTS, "", "", "mistake", ""]
    command = [sys.executable, str(script(tmp_path, ROUNDS)), ",".join(rounds)]
    environment = child_environment() | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    codes = [json.loads(line.removeprefix("codes ")) for line in lines if line.startswith("codes ")]
    assert [code[1] for code in codes[:3]] == [9, 9, 9], ended.stdout
    assert codes[3:] == [[0, 0, 0], [0, 0, 0], [2, 2, 2], [2, 2, 2]], (ended.stdout, ended.stderr)
    # One of the dead rounds had met, so that it may have written a checkpoint.
    said = [line for line in lines if not line.startswith("codes ")]
    again = [f"3 processes, started {before} times before" for before in (1, 1, 1, 2, 2, 2)]
    assert said[:-1] == again and said[-1].startswith("error: ") and "NUM_GPUS" in said[-1], (said, ended.stderr)


SILENT = """
import os, signal, sys, threading, time
import torch.distributed as dist
from core.processes import meeting

reading, writing = os.pipe()
child = os.fork()
if child == 0:  # the machine with the store
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(writing, b"%d\\n" % store.port)
    time.sleep(100)
    os._exit(0)
meeting._store = dist.TCPStore("localhost", int(os.read(reading, 20)))
meeting.ANSWER_TIMEOUT = 5.0
try:
    assert meeting._mistake() is None
    assert meeting._mistake("mine") == "mine" and meeting._mistake() == "mine"
    os.kill(child, signal.SIGSTOP)  # as silent as one whose cable is out
    os.waitpid(child, os.WUNTRACED)
    began = time.monotonic()
    assert meeting._mistake() is None and meeting._mistake("other") is None
    assert time.monotonic() - began < 30
    print("done", flush=True)
finally:
    os.kill(child, signal.SIGKILL)
os._exit(0)  # a thread that still asks would learn of the killed store in the middle of Python's own end
"""


def test_a_store_that_is_cut_off_does_not_keep_a_process_alive():
    command = [sys.executable, "-c", SILENT]
    ended = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
