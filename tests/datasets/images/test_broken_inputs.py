"""Everything that is no photograph is refused by a line or becomes what is documented: in little memory and time."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import broken_inputs
from tests.small_run import ROOT, child_environment, script

# Decodes each file in a forked process of its own, which tells what came of it, its peak of memory above what it had
# before, its time, and what it printed.
PROGRAM = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
import cv2
from datasets.images.decode import ImageError, decode

cv2.setNumThreads(1)

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def report(path):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = kib("VmRSS"), time.process_time()
    try:
        image = decode(path)
        result = {}
    except ImageError as error:
        image, result = None, {"error": str(error)}
    result |= {"seconds": time.process_time() - start, "mib": (kib("VmHWM") - before) / 1024}
    if image is not None:
        digest = hashlib.sha256(image).hexdigest() if image.size < 10**7 else None
        result |= {"dtype": str(image.dtype), "shape": image.shape, "sha256": digest,
                   "range": [int(image.min()), int(image.max())], "contiguous": image.flags.c_contiguous}
    return result

paths, results = sys.argv[1:], {}
for path in paths:
    child = os.fork()
    if child == 0:
        output = os.open("printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(60)
        result = report(path)
        Path("result").write_text(json.dumps(result))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    results[path] = json.loads(Path("result").read_text()) if status == 0 else {"status": status}
    results[path]["printed"] = Path("printed").read_text()
print(json.dumps(results))
"""
KINDS = {kind.name: kind for kind in broken_inputs.kinds()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    program = script(folder, PROGRAM)
    (folder / "images").mkdir()
    broken_inputs.write_all(folder / "images")
    environment = child_environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, program.name, *(f"images/{name}" for name in KINDS)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", KINDS)
def test_is_refused_or_converted_within_bounds(results, name):
    kind, result = KINDS[name], results[f"images/{name}"]
    assert "status" not in result, f"died: wait status {result['status']}"
    assert result["printed"] == ""
    assert result["mib"] <= 1024
    assert result["seconds"] <= 5
    if kind.refused:
        path, _, reason = result.get("error", "decoded").partition(": ")
        assert path == f"images/{name}"
        assert re.search(kind.refused, reason)
        assert "\n" not in reason
    else:
        assert "error" not in result, result["error"]
        assert (result["dtype"], result["contiguous"]) == ("uint8", True)
        assert tuple(result["shape"]) == kind.pixels.shape
        if any(kind.pixels.strides):
            pixels = np.ascontiguousarray(kind.pixels)
            assert result["sha256"] == hashlib.sha256(pixels).hexdigest()
        else:
            assert result["range"] == [kind.pixels[0, 0, 0]] * 2


def test_there_are_forty_kinds_and_more():
    refused = [kind for kind in KINDS.values() if kind.refused]
    assert len(KINDS) == len(broken_inputs.kinds())
    assert len(refused) >= 80
    assert len(KINDS) - len(refused) >= 25
    assert all((kind.refused is None) != (kind.pixels is None) for kind in KINDS.values())
