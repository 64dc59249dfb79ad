"""The published head, which ours is timed against, on the numbers of the published code itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.margin import CurricularFaceHead
from scripts.benchmarks.published_layers import PublishedHead

GOLDENS = Path(__file__).parents[2] / "goldens"


def assert_golden(found: torch.Tensor, want: np.ndarray) -> None:
    found = found.detach().numpy()
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= 1e-9 * np.abs(want).max()


def assert_steps(weight: np.ndarray, xs: np.ndarray, ys: np.ndarray, s_m: np.ndarray, golden: dict) -> None:
    scale, margin = s_m.tolist()
    head = PublishedHead(weight.shape[1], len(weight), scale=scale, margin=margin).double()
    head.load_state_dict({"weight": torch.from_numpy(weight), "t": torch.zeros(1)})
    for step, (x, labels) in enumerate(zip(xs, ys, strict=True)):
        head.weight.grad = None
        x, labels = torch.from_numpy(x).double().requires_grad_(), torch.from_numpy(labels)
        logits = head(x, labels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        found = {"logits": logits, "loss": loss, "t": head.t, "gx": x.grad, "gW": head.weight.grad}
        held = [name for name in found if f"{step}/{name}" in golden]  # the copy has gradients of one step only
        assert {"logits", "loss", "t"} <= set(held) and (step < len(xs) - 1 or "gW" in held)
        for name in held:
            want = golden[f"{step}/{name}"]
            assert_golden(found[name].reshape(want.shape), want)


def test_goldens_of_the_repository():
    golden = np.load(GOLDENS / "model" / "heads.npz")
    steps = {key.removeprefix("curricular/"): golden[key] for key in golden if key.startswith("curricular/")}
    assert_steps(golden["W"], golden["x"], golden["y"], golden["s_m"], steps)


@pytest.mark.parametrize("name", ["dolg", "wide"])
def test_all_goldens(shared, name):
    golden = np.load(shared / "goldens" / "golden" / "loss.npz")
    prefix = f"{name}/curricular/f64/"
    steps = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
    assert_steps(*(golden[f"{name}/{part}"] for part in ("W", "x", "y", "s_m")), steps)


def test_ours_is_the_same_head():
    torch.manual_seed(0)
    published, ours = PublishedHead(6, 40, scale=30.0, margin=0.15), CurricularFaceHead(6, 40, scale=30.0, margin=0.15)
    ours.load_state_dict(published.state_dict())
    x, labels = torch.randn(8, 6), torch.randint(40, (8,))
    loss, _ = ours.loss(x, labels)
    torch.testing.assert_close(loss, F.cross_entropy(published(x, labels), labels))
    torch.testing.assert_close(ours.t, published.t)
