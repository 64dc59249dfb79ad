"""All shards of an extraction on one machine: a process each, one line of progress for all."""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from core.base.errors import UserError, entry_point
from core.base.locks import folder_lock
from core.base.progress import PROGRESS_PIPE, bar
from core.base.terminal import work_goes_on
from core.base.version import ROOT
from core.config import load_cfg

USAGE = "usage: [SHARDS=N] sh scripts/run_extractor.sh CFG [KEY VALUE ...]"
GRACE = 30.0  # seconds from SIGTERM to SIGKILL
PER_SHARD_LINE = "this shard is done"  # what only one shard's log is to say


@entry_point
def main(argv: list[str] | None = None) -> None:
    """CFG [KEY VALUE ...]; exit code 1 if a shard failed, after the others have done their work."""
    work_goes_on()
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        raise UserError(USAGE)
    path, *overrides = arguments
    if {"INFER.TOTAL_NUM", "INFER.CUT_NUM"} & set(overrides):
        raise UserError("run_extractor.sh sets INFER.TOTAL_NUM and INFER.CUT_NUM itself; use SHARDS=N")
    cfg = load_cfg(path, overrides)
    if cfg.INFER.IMAGES:  # a mistake in it is told once, and archives are indexed once, not by every shard
        from evaler.sources.images import named_images  # not for all: it takes seconds to import

        named_images(cfg.INFER.IMAGES, cache_dir=Path(cfg.OUT_DIR) / "features")
    gpus = visible_gpus() if cfg.NUM_GPUS else []
    count = shard_count(len(gpus), cfg.INFER.THREADS)
    if not gpus:
        overrides += ["NUM_GPUS", "0"]
    logs = Path(cfg.OUT_DIR) / "logs"
    shards: list[Shard] = []
    with folder_lock(logs), _ending(shards):  # a second start would write into the same logs
        for number in range(1, count + 1):
            device = gpus[(number - 1) % len(gpus)] if gpus else ""
            shards.append(Shard.start(number, count, [path, *overrides], device=device, logs=logs))
        _watch(shards)
    for line in dict.fromkeys(line for shard in shards for line in shard.said()):
        print(line)
    failed = [shard for shard in shards if shard.process.returncode]
    for shard in failed:
        print(shard.failure(), file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {count} shards failed; run this again to finish the rest", file=sys.stderr)
        sys.exit(1)


def visible_gpus() -> list[str]:
    """Those of CUDA_VISIBLE_DEVICES, where a negative index hides itself and all that follow; else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        except OSError:
            return []
        return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
    devices = []
    for device in filter(None, named.replace(" ", "").split(",")):
        if device.startswith("-"):
            break
        devices.append(device)
    return devices


def shard_count(gpus: int, threads: int) -> int:
    """SHARDS; without it one a GPU, or as many as the CPU has cores for."""
    wanted = os.environ.get("SHARDS", "")
    if wanted:
        if not re.fullmatch("[1-9][0-9]*", wanted):
            raise UserError(f"SHARDS is {wanted}; it takes a whole number from 1 up")
        return int(wanted)
    return gpus or max(1, len(os.sched_getaffinity(0)) // threads)


@dataclass(eq=False)
class Shard:
    """One process, what it prints (`log`), and how far it is."""

    number: int
    process: subprocess.Popen
    pipe: BinaryIO
    log: Path
    done: int = 0
    total: int | None = None  # until it has told
    _rest: bytes = field(default=b"", repr=False)

    @classmethod
    def start(cls, number: int, count: int, arguments: Sequence[str], *, device: str, logs: Path) -> "Shard":
        path, *overrides = arguments
        command = [sys.executable, str(ROOT / "evaler" / "infer.py"), "--cfg", path]
        command += ["INFER.TOTAL_NUM", str(count), "INFER.CUT_NUM", str(number), *overrides]
        log = logs / f"extract-{number}-of-{count}.log"
        reading, writing = os.pipe()
        try:
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": device, PROGRESS_PIPE: str(writing)},
                )
        finally:
            os.close(writing)
        return cls(number, process, open(reading, "rb", buffering=0), log)

    def read(self) -> bool:
        """Take in what the process tells; False at its end."""
        data = self.pipe.read(1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self.done, self.total = map(int, lines[-1].split())
        return bool(data)

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def said(self) -> list[str]:
        """What is worth showing, if other shards have not said the same."""
        return [line for line in self.lines() if PER_SHARD_LINE not in line] if not self.process.returncode else []

    def failure(self) -> str:
        code = self.process.returncode
        how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        last = next((line for line in reversed(self.lines()) if line.strip()), "it printed nothing")
        return f"shard {self.number}: {how}: {last} (all of it in {self.log})"


@contextlib.contextmanager
def _ending(shards: list[Shard]):
    """Leave no process behind, however this one ends."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the shards are being ended already
        running = [shard for shard in shards if shard.process.poll() is None]
        for shard in running:
            shard.process.terminate()
        for shard in running:
            try:
                shard.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                shard.process.kill()
                shard.process.wait()
        if running:
            print("ended by a signal; run this again to go on", file=sys.stderr)


def _watch(shards: list[Shard]) -> None:
    """Show the progress of all until the last has ended; tell of one that fails at once."""
    with selectors.DefaultSelector() as selector, bar(None, "extracting", unit="image") as shown:
        for shard in shards:
            selector.register(shard.pipe, selectors.EVENT_READ, shard)
        while selector.get_map():
            for key, _ in selector.select():
                shard = key.data
                if not shard.read():  # the process has ended
                    selector.unregister(shard.pipe)
                    shard.pipe.close()
                    if shard.process.wait():
                        tqdm.write(f"{shard.failure()}; the others go on", file=sys.stderr)
            _show(shown, shards)


def _show(shown: tqdm, shards: list[Shard]) -> None:
    reported = [(shard.done, shard.total) for shard in shards if shard.total is not None]
    running = sum(shard.process.poll() is None for shard in shards)
    shown.set_postfix_str(f"{running} of {len(shards)} shards at work", refresh=False)
    if len(reported) == len(shards):
        shown.total = sum(total for _, total in reported)
    shown.update(sum(done for done, _ in reported) - shown.n)
