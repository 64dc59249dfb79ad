"""The estimate of a run's memory against real numbers, and what is free against files as the kernel writes them."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core import memory
from core.builders import build_classifier
from core.config import load_cfg
from tests.small_run import SMALL_MODEL, overrides, script, start

CPU = torch.device("cpu")


def settings(**more):
    return load_cfg(None, overrides(SMALL_MODEL, {"NUM_GPUS": 0, "TEST.SPLIT": ""}, more))


def test_the_bytes_that_are_alive_at_once_are_counted():
    """Known by hand: x and y of 4 MB and their sum are alive together; z comes when the sum is gone."""
    with FakeTensorMode(), memory._Peak() as peak:
        x = torch.empty(1 << 20)
        y = x + 1
        total = x + y
        view = total[:5]
        del total, view
        z = torch.cat([x, y])[None]
        del x, y, z
    assert (peak.most >> 20, peak.now) == (16, 0)


def test_the_parts_of_an_estimate():
    cfg = settings(**{"TRAIN.BATCH_SIZE": 16, "TRAIN.IM_SIZE": 128})
    model = build_classifier(cfg)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    plain = memory.estimate(cfg, model)
    assert (plain.gradients, plain.optimizer, plain.average, plain.validation) == (parameters, parameters, 0, 0)
    other = {"OPTIM.OPTIMIZER": "adamw", "OPTIM.EMA_DECAY": 0.9, "TRAIN.ACCUM_STEPS": 2, "TEST.SPLIT": "x"}
    more = memory.estimate(settings(**{"TRAIN.BATCH_SIZE": 16, "TRAIN.IM_SIZE": 128}, **other), model)
    assert (more.optimizer, more.average) == (2 * parameters, more.weights)
    assert more.activations == pytest.approx(plain.activations / 2, rel=0.35) and more.validation > 0
    bf16 = memory.estimate(settings(**{"TRAIN.BATCH_SIZE": 16, "TRAIN.IM_SIZE": 128, "TRAIN.PRECISION": "bf16"}), model)
    assert 0.4 * plain.activations < bf16.activations < 0.8 * plain.activations


def test_a_run_that_does_not_fit_is_warned_of_and_one_that_fits_is_not(monkeypatch):
    cfg = settings(**{"TRAIN.BATCH_SIZE": 64, "TRAIN.IM_SIZE": 256})
    model = build_classifier(cfg)
    monkeypatch.setattr(memory, "available", lambda device: 40 << 30)
    assert memory.memory_warning(cfg, model, CPU) == []
    monkeypatch.setattr(memory, "available", lambda device: 100 << 20)
    (line,) = memory.memory_warning(cfg, model, CPU)
    assert "0.1 GB of this machine are free" in line and "Lower TRAIN.BATCH_SIZE or TRAIN.IM_SIZE" in line
    assert "activations" in line and "average" not in line


GROUPS = {
    "version 2": (
        {
            "proc/self/cgroup": "0::/user/job\n",
            "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/job/memory.current": "100\n",
            "sys/fs/cgroup/user/memory.max": "5000\n",
            "sys/fs/cgroup/user/memory.current": "3000\n",
            "sys/fs/cgroup/user/memory.stat": "anon 2500\ninactive_file 500\n",
        },
        [2500],
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10\n",
        },
        [1010],
    ),
    "none": ({}, []),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_control_groups_leave(tmp_path, kind):
    files, free = GROUPS[kind]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert list(memory._free_of_groups(tmp_path)) == free


def test_what_the_machine_has(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   40 kB\n")
    assert memory._free_of_machine(tmp_path / "meminfo") == 40 << 10
    assert 0 < memory.available(CPU) < 1 << 50


@pytest.mark.parametrize(("limits", "free"), [([], 5000), ([3000, 4000], 3000), ([-1], 0)])
def test_the_smallest_limit_holds_and_none_is_needed(monkeypatch, limits, free):
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 5000)
    monkeypatch.setattr(memory, "_free_of_groups", lambda: iter(limits))
    assert memory.available(CPU) == free


REAL = """
import sys, torch
from core.builders import build_classifier
from core.config import load_cfg
torch.set_num_threads(1)
cfg = load_cfg(None, sys.argv[1:])
model = build_classifier(cfg).to(memory_format=torch.channels_last).train()
held = lambda key: next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(key))
images = torch.zeros(16, 3, 128, 128).contiguous(memory_format=torch.channels_last)
before = held("VmRSS")
model(images, torch.zeros(16, dtype=torch.int64))[0].backward()
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_against_what_forward_and_backward_take(tmp_path):
    given = overrides(SMALL_MODEL, {"NUM_GPUS": 0, "TEST.SPLIT": "", "TRAIN.BATCH_SIZE": 16, "TRAIN.IM_SIZE": 128})
    output, errors = start(script(tmp_path, REAL), *given).communicate(timeout=200)
    cfg = load_cfg(None, given)
    need = memory.estimate(cfg, build_classifier(cfg))
    assert 0.5 < int(output) / (need.gradients + need.activations) < 1.6, errors
