"""Extractions whose shards are killed again and again end with the bytes of one that is left alone.

Small in the suite; a million images, and full-size photographs, behind the marker `soak`.
"""

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core import builders
from core.base.files import sha256_file
from core.config import load_cfg
from datasets.images.decode import decode
from evaler.extraction.chunks import plans, present
from tests.small_run import ROOT, SMALL_MODEL, child_environment, overrides, photograph, script, write_image

# infer.py with a network of one convolution in place of DOLG.
STAND_IN = """
import sys
import torch
from torch import nn
from evaler.extraction import command as extract
from evaler.features.provenance import Provenance

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 32)
        self.requires_grad_(False)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))

def load_network(cfg):
    torch.set_num_threads(cfg.INFER.THREADS)
    return Tiny().eval(), Provenance(weights="none", weights_sha256="0", batch_size=1, device="CPU")

extract.load_network = load_network
extract.main()
"""


class Place:
    """A list whose images are the files of one folder, again and again under other names."""

    def __init__(self, folder: Path, command: list[str], files: list[np.ndarray], count: int) -> None:
        self.folder, self.command, self.count, self.unique = folder, command, count, len(files)
        for index, image in enumerate(files):
            write_image(folder / "images" / "all" / f"{index:04d}.jpg", image)
        names = []
        for first in range(0, count, len(files)):
            (folder / "images" / f"{first:07d}").symlink_to("all")
            names += [f"{first:07d}/{index:04d}.jpg" for index in range(min(len(files), count - first))]
        (folder / "images" / "list.txt").write_text("".join(f"{name}\n" for name in names))
        self.names = names

    def start(self, out: str, images: str, **settings) -> subprocess.Popen:
        keys = {"OUT_DIR": out, "INFER.IMAGES": f"images/{images}"}
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        with open(self.folder / f"{out}-{settings.get('INFER__CUT_NUM', 1)}.log", "ab") as log:
            return subprocess.Popen(
                [*self.command, *overrides(keys)],
                cwd=self.folder,
                env=child_environment() | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def expected(self, **settings) -> str:
        """sha256 of the .npy, from one process that describes every file once and is left alone."""
        assert self.start("alone", "all", **settings).wait() == 0
        vectors = np.load(self.folder / "alone" / "features" / "all" / "images.npy")
        assert len(vectors) == self.unique
        file = io.BytesIO()
        np.save(file, vectors[np.arange(self.count) % self.unique])
        return hashlib.sha256(file.getbuffer()).hexdigest()

    def killed(self, *, shards: int, kills: int, pause: tuple[float, float], seed: int, **settings) -> int:
        """Run all shards to the end, killing one at random again and again; return how often a chunk was done anew."""
        rng, running, killed = random.Random(seed), {}, 0

        def begin(cut: int) -> None:
            running[cut] = self.start("out", "list.txt", INFER__TOTAL_NUM=shards, INFER__CUT_NUM=cut, **settings)

        for cut in range(1, shards + 1):
            begin(cut)
        while running:
            time.sleep(rng.uniform(*pause))
            for cut, process in list(running.items()):
                if process.poll() is not None:
                    assert process.returncode == 0, (self.folder / f"out-{cut}.log").read_text()
                    del running[cut]
            if running and killed < kills:
                cut = rng.choice(sorted(running))
                running[cut].send_signal(signal.SIGKILL)
                if running[cut].wait() == -signal.SIGKILL:
                    killed += 1
                    begin(cut)
        return killed

    def check(self, expected: str) -> None:
        folder = self.folder / "out" / "features" / "list"
        assert sorted(path.name for path in folder.iterdir()) == [
            f"images.{s}" for s in ("files", "json", "npy", "tsv")
        ]
        assert sha256_file(folder / "images.npy") == expected
        lines = (folder / "images.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == self.names
        manifest = json.loads((folder / "images.json").read_text())
        assert manifest["images"] == manifest["count"] == self.count and manifest["rejected"] == []


def tiny_place(folder: Path, files: list[np.ndarray], count: int) -> Place:
    folder.mkdir(exist_ok=True)
    (folder / "some.yaml").touch()
    command = [sys.executable, str(script(folder, STAND_IN)), "--cfg", "some.yaml"]
    command += ["NUM_GPUS", "0", "INFER.SCALES", "[1]", "MODEL.HEADS.REDUCTION_DIM", "32"]
    return Place(folder, command, files, count)


def test_killed_at_random(tmp_path):
    place = tiny_place(tmp_path, [photograph(seed, 96, 72 + seed) for seed in range(7)], 2500)
    killed = place.killed(shards=2, kills=2, pause=(2.5, 3.5), seed=1, INFER__CHUNK_SIZE=50)
    place.check(place.expected())
    assert killed >= 1


def test_a_restart_redoes_at_most_one_chunk(tmp_path):
    place = tiny_place(tmp_path, [photograph(seed, 96, 72) for seed in range(7)], 20_000)
    process = place.start("out", "list.txt", INFER__CHUNK_SIZE=100)
    parent = tmp_path / "out" / "features" / "list"
    while not any(len(present(folder)) >= 5 for folder in plans(parent)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (folder,) = plans(parent)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.chunk")}
    assert 5 <= len(before) < 200
    process = place.start("out", "list.txt", INFER__CHUNK_SIZE=100)
    while len(present(folder)) < len(before) + 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def real_photographs(shared: Path, folder: str) -> list[np.ndarray]:
    return [decode(path) for path in sorted((shared / folder / "jpg").rglob("*.jpg"))]


@pytest.mark.soak
def test_a_million_images_in_eight_shards_killed_a_hundred_times(tmp_path, shared):
    """JPEGs of at most 96 px cut from real photographs."""
    rng, files = np.random.default_rng(0), []
    pictures = real_photographs(shared, "distractors") + real_photographs(shared, "landmarks-retrieval")
    for index in range(1001):
        picture = pictures[index % len(pictures)]
        height, width = rng.integers(64, 97, 2).tolist()
        y, x = int(rng.integers(picture.shape[0] - height)), int(rng.integers(picture.shape[1] - width))
        files.append(picture[y : y + height, x : x + width])
    place = tiny_place(tmp_path / "place", files, 1_001_001)
    expected = place.expected()
    start = time.monotonic()
    killed = place.killed(shards=8, kills=100, pause=(3.0, 7.0), seed=2)
    print(f"\n{killed} kills, {(time.monotonic() - start) / 60:.1f} min")
    place.check(expected)
    assert killed == 100


@pytest.mark.soak
def test_full_size_photographs_at_five_scales_killed_twenty_times(tmp_path, shared):
    torch.manual_seed(3)
    small = SMALL_MODEL | {"MODEL.FUSION": "global", "MODEL.HEADS.IN_FEAT": 2048}
    network = builders.build_descriptor(load_cfg(None, overrides(small)))
    torch.save(network.state_dict(), tmp_path / "weights.pyth")
    (tmp_path / "some.yaml").touch()
    command = [sys.executable, str(ROOT / "evaler" / "infer.py"), "--cfg", "some.yaml"]
    # In bf16 it takes half the time.
    settings = {"NUM_GPUS": 0, "TEST.WEIGHTS": "weights.pyth", "INFER.CHUNK_SIZE": 16, "INFER.PRECISION": "bf16"}
    command += overrides(small, settings)
    place = Place(tmp_path, command, real_photographs(shared, "distractors"), 5000)
    expected = place.expected()
    start = time.monotonic()
    killed = place.killed(shards=2, kills=20, pause=(10.0, 30.0), seed=3)
    print(f"\n{killed} kills, {(time.monotonic() - start) / 60:.1f} min")
    place.check(expected)
    assert killed == 20
