"""The published code's numbers.

With `../shared` beside the repository, its `compare.py` runs on `golden_adapter.py` as anybody would run it. Without,
a small copy in `tests/goldens` is checked: the recipe of weights and images is written down here a second time.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens"
ADAPTER = TESTS / "golden_adapter.py"
IMAGE = GOLDENS / "datasets" / "syn_97x161.png"
BOX = [5.5, 20.5, 90.5, 150.5]  # of IMAGE, as the goldens' bbox.json has it

# Checks of each group in compare.py. A function that the adapter lacks would be skipped silently and lower them.
CHECKS = {"decode": 17, "eval": 19, "evalunit": 54, "loss": 54, "lr": 7, "preprocess": 126, "transforms": 21}
CHECKS_OF_NETWORKS = {
    "R50_noMA": {"model": 93, "train": 345},
    "R50_MA": {"model": 93, "train": 357},
}


def compare(shared: Path, precision: str, *choice: str) -> dict[str, int]:
    """Run compare.py in a process of its own; return the number of checks of each group."""
    command = [sys.executable, "compare.py", "--candidate", str(ADAPTER), "--prec", precision, *choice]
    # Threads that wait must not spin: where other work shares the cores, that makes it five times slower.
    environment = os.environ | {"DT": precision, "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("EVAL_1M", None)
    environment.pop("GND_DIR", None)
    result = subprocess.run(
        command, cwd=shared / "goldens", env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert not re.search(r"^(skip|FAIL)", result.stdout, re.MULTILINE)
    groups: dict[str, int] = {}
    for name, checks, failed in re.findall(r"^ok +(\w+)/.*?(\d+) checks, +(\d+) failed", result.stdout, re.MULTILINE):
        assert failed == "0"
        groups[name] = groups.get(name, 0) + int(checks)
    return groups


@pytest.mark.slow
def test_published_numbers_in_float64(shared):
    """The network without atrous branches in float64 is checked below, by the copy in the repository."""
    assert compare(shared, "f64", "--variants", "R50_MA") == CHECKS | CHECKS_OF_NETWORKS["R50_MA"]


@pytest.mark.slow
def test_published_numbers_in_float32(shared):
    """Of what computes in the precision that is asked for; one network."""
    groups = compare(shared, "f32", "--variants", "R50_noMA", "--only", "loss,model,train")
    network = CHECKS_OF_NETWORKS["R50_noMA"]
    # float32 has no bound for the logits of the last training step.
    assert groups == {"loss": CHECKS["loss"], "model": network["model"], "train": network["train"] - 1}


@pytest.mark.soak
@pytest.mark.parametrize(("precision", "bounded"), [("f64", 0), ("f32", 2)])
def test_all_published_numbers(shared, precision, bounded):
    networks = CHECKS_OF_NETWORKS.values()
    model, train = (sum(network[group] for network in networks) for group in ("model", "train"))
    assert compare(shared, precision) == CHECKS | {"model": model, "train": train - bounded}


# ------------------------------------------------------------------------------------------- the copy in the repository


@pytest.fixture(scope="module")
def adapter() -> ModuleType:
    """The adapter, computing in float64."""
    path_before, precision = sys.path.copy(), os.environ.get("DT")
    os.environ["DT"] = "f64"
    try:
        spec = importlib.util.spec_from_file_location("golden_adapter_float64", ADAPTER)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path_before
        del os.environ["DT"]
        if precision is not None:
            os.environ["DT"] = precision
    return module


def random_bits(label: str, n: int) -> np.ndarray:
    """uint64 [n], a stream of its own for every label."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")
    return np.random.PCG64(seed).random_raw(n)


def uniform(label: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1), multiples of 2^-23."""
    bits = random_bits(label, int(np.prod(shape, dtype=int))) >> np.uint64(40)
    return (bits.astype(np.float64) / 2**23 - 1).reshape(shape)


def recipe_weight(key: str, shape: tuple[int, ...], batch_norms: set[str]) -> np.ndarray:
    layer, _, leaf = key.rpartition(".")
    if leaf == "num_batches_tracked":
        return np.full(shape, 1000, np.int64)
    if key in ("pool_g.p", "desc_cls.t"):
        return np.full(shape, {"pool_g.p": 2.875, "desc_cls.t": 0.015625}[key], np.float32)
    u = uniform(f"dolg-golden/0/{key}", shape)
    if leaf == "running_var":
        value = 1 + u / 2
    elif leaf == "running_mean" or (layer in batch_norms and leaf == "bias"):
        value = u / 4
    elif layer in batch_norms:
        value = 0.125 + 0.1875 * u if layer.endswith(".c_bn") else 0.875 + 0.375 * u
    elif leaf == "bias":
        value = u / 8 + (key == "localmodel.conv2.bias")
    elif key in ("desc_cls.weight", "localmodel.conv2.weight"):
        value = u / (16 if key == "desc_cls.weight" else 8)
    else:
        gain = 6 if len(shape) == 4 else 3
        value = u * float(np.float32(np.sqrt(gain / np.prod(shape[1:]))))
        if key == "fc.weight":
            value[:, shape[1] // 2 :] *= 64
    return value.astype(np.float32)


def recipe_weights(variant: str) -> dict[str, np.ndarray]:
    lines = (GOLDENS / "model" / "names_R50_MA.txt").read_text().splitlines()
    shapes = {}
    for key, text in (line.split() for line in lines):
        if variant == "R50_MA" or not key.startswith("localmodel.aspp."):
            shapes[key] = () if text == "scalar" else tuple(map(int, text.split("x")))
    batch_norms = {key.rpartition(".")[0] for key in shapes if key.endswith(".running_mean")}
    return {key: recipe_weight(key, shape, batch_norms) for key, shape in shapes.items()}


def fingerprint(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key]
        digest.update(f"{key}|{value.dtype.str}|{value.shape}|".encode() + value.tobytes())
    return digest.hexdigest()


def recipe_image(label: str, side: int) -> np.ndarray:
    """Smooth noise, stripes, fine noise and blocks: uint8 [side, side, 3]."""
    place = np.arange(side)
    image = np.zeros((side, side, 3))
    cell = np.minimum((place * 8 / (side - 1)).astype(int), 7)
    part = place * 8 / (side - 1) - cell
    for channel in range(3):
        coarse = uniform(f"img/{label}/{channel}/coarse", (9, 9))
        rows = [(cell, 1 - part), (cell + 1, part)]
        smooth = sum(coarse[np.ix_(y, x)] * v[:, None] * w[None] for y, v in rows for x, w in rows)
        k = np.abs(uniform(f"img/{label}/{channel}/stripe", (3,)))
        slant = place[None] * (2 + int(3 * k[0])) + place[:, None] * (1 + int(4 * k[1]))
        stripes = slant // 16 % 2 * 2 - 1
        fine = uniform(f"img/{label}/{channel}/fine", (side, side))
        image[..., channel] = 118 + 20 * channel + 85 * smooth + 26 * stripes + 18 * fine
    for y, x, height, width, colour in random_bits(f"img/{label}/blocks", 40).reshape(8, 5).tolist():
        y, x, height, width = y % side, x % side, 4 + height % (side // 4), 4 + width % (side // 4)
        image[y : y + height, x : x + width] = [colour >> 8 * channel & 255 for channel in range(3)]
    return np.clip(np.floor(image), 0, 255).astype(np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> float64 [B, 3, H, W]."""
    mean, sd = np.array([0.406, 0.456, 0.485]), np.array([0.225, 0.224, 0.229])
    return np.ascontiguousarray(((images / 255 - mean) / sd).transpose(0, 3, 1, 2))


def assert_golden(got, want: np.ndarray, tolerance: float = 1e-9) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def thinned(value: np.ndarray) -> np.ndarray:
    """About 128 of the values, as the golden file holds them."""
    value = value.reshape(-1)
    return value[:: max(1, value.size // 128)]


@pytest.fixture(scope="module")
def network() -> np.lib.npyio.NpzFile:
    return np.load(GOLDENS / "model" / "network.npz")


@pytest.mark.parametrize("variant", ["R50_MA", "R50_noMA"])
def test_network(adapter, network, variant):
    weights = recipe_weights(variant)
    assert fingerprint(weights) == network[f"{variant}/weights_sha256"].item()
    built = adapter.build({"depth": 50, "with_ma": variant == "R50_MA", "num_classes": 10}, weights)
    # As the goldens were made: normalised in float32.
    image = cv2.imread(str(IMAGE)).transpose(2, 0, 1) / np.float32(255)
    image = (image - np.float32([[[0.406]], [[0.456]], [[0.485]]])) / np.float32([[[0.225]], [[0.224]], [[0.229]]])
    found = adapter.forward(built, image[None])
    for name in ("f3", "f4", "fl"):
        assert_golden(thinned(found[name][0].mean((1, 2))), network[f"{variant}/{name}.cmean"])
    for name in ("att", "gem", "fg", "fo", "feat"):
        assert_golden(thinned(found[name]), network[f"{variant}/{name}"])
    assert_golden(adapter.extract(built, str(IMAGE), BOX)[::4], network[f"{variant}/crop.feature"])
    if variant == "R50_noMA":  # the other costs seconds and shows nothing more
        assert_golden(adapter.extract(built, str(IMAGE), None)[::4], network[f"{variant}/full.feature"])


def test_training_steps(adapter, network):
    """Two steps of SGD on batches of four images, BN in training mode: losses, logits and every tensor after them."""
    batches = []
    for step in range(2):
        images = normalised(np.stack([recipe_image(f"train/{step}/{i}", 96) for i in range(4)]))
        labels = (random_bits(f"train/{step}/y", 4) % np.uint64(10)).astype(np.int64)
        batches.append((images.astype(np.float32), labels))
    variant = {"depth": 50, "with_ma": False, "num_classes": 10}
    result = adapter.train(variant, recipe_weights("R50_noMA"), batches, network["train/lr"].tolist())
    assert_golden(result["loss"], network["train/loss"])
    assert_golden(result["logits"], network["train/logits"])
    keys = network["train/keys"].tolist()
    assert set(keys) <= set(result["state"])
    for key, (projection, norm) in zip(keys, network["train/sketches"], strict=True):
        value = np.asarray(result["state"][key], np.float64).reshape(-1)
        got = [value @ uniform(f"sketch/{key}", (value.size,)), np.linalg.norm(value)]
        assert np.abs(np.array(got) - [projection, norm]).max() <= 1e-9 * max(norm, 1e-12), key


@pytest.mark.parametrize("kind", ["curricular", "arcface"])
def test_heads(adapter, kind):
    golden = np.load(GOLDENS / "model" / "heads.npz")
    scale, margin = golden["s_m"].tolist()
    t = 0.0
    for step in range(3):
        x, labels = golden["x"][step], golden["y"][step]
        found = adapter.head(kind, golden["W"].copy(), x.copy(), labels.copy(), scale, margin, t)
        for name in ("logits", "loss", "t", "gx", "gW"):
            if f"{kind}/{step}/{name}" in golden:
                assert_golden(found[name], golden[f"{kind}/{step}/{name}"])
        t = found["t"].item() if kind == "curricular" else 0.0


def test_learning_rates(adapter):
    cases = json.loads((GOLDENS / "lr.json").read_text())["cases"]
    for case in (case for case in cases if case["impl"] == "dolg"):
        rates = adapter.lr(case["policy"], case["optim"])
        np.testing.assert_allclose(rates, case["lr"], rtol=1e-12, atol=0)
