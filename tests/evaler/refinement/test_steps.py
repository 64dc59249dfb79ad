"""Whitening, augmentation, expansion: against slower versions and by known values."""

import numpy as np
import pytest

from core.config import load_cfg
from evaler.features.provenance import Provenance
from evaler.features.rows import Mapped, Stacked
from evaler.features.store import Features, FeaturesError
from evaler.refinement import steps, whitening
from evaler.refinement.expansion import augment, expand
from evaler.refinement.reranking import rerank
from evaler.refinement.step import Step
from evaler.refinement.steps import Refinement
from evaler.refinement.whitening import Whitening, WhiteningStep, learn


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
SKEWED = unit(RNG.normal(size=(400, 6)) * [5, 3, 2, 1, 1, 0.5] + [1, 0, 0, 2, 0, 0])


# ------------------------------------------------------------------------------------------------------- whitening


def test_whitened_descriptors_have_no_mean_and_no_covariance_but_one():
    mean, projection = learn(SKEWED)
    moved = (SKEWED - mean) @ projection
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(moved.T, bias=True), np.eye(6), atol=1e-5)


def test_the_directions_kept_are_those_of_the_largest_variance():
    _, whole = learn(SKEWED)
    mean, projection = learn(SKEWED, dim=2)
    np.testing.assert_array_equal(projection, whole[:, :2])
    # One direction kept is the one along which the descriptors vary most: no other has more variance.
    direction = projection[:, 0] / np.linalg.norm(projection[:, 0])
    most = ((SKEWED - mean) @ direction).var()
    assert all(((SKEWED - mean) @ other).var() <= most + 1e-6 for other in unit(RNG.normal(size=(300, 6))))
    out = Whitening(mean, projection, {})(SKEWED)
    assert out.shape == (400, 2) and out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("rows", "dim"), [(SKEWED[:4], 0), (SKEWED[:4], 4), (SKEWED[[0] * 9], 1), (SKEWED, 7)])
def test_too_few_directions(rows, dim):
    with pytest.raises(ValueError, match="use more images or a smaller --dim"):
        learn(rows, dim=dim)


def test_a_whitening_on_disk(tmp_path):
    whitening.write(tmp_path / "w.npz", Whitening(*learn(SKEWED, dim=3), {"set": "x"}))
    read = whitening.read(tmp_path / "w.npz")
    np.testing.assert_array_equal(read(SKEWED), Whitening(*learn(SKEWED, dim=3), {})(SKEWED))
    assert read.learned_on == {"set": "x"} and read.dim == 3


def test_a_damaged_whitening_is_refused(tmp_path):
    """NumPy takes a flipped bit of a number as it is."""
    path = tmp_path / "w.npz"
    whitening.write(path, Whitening(np.zeros(3), np.full((3, 3), 0.5), {}))
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(0.5).tobytes()) + 6] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="w.npz: not a whitening of evaler/whiten.py, or damaged"):
        whitening.read(path)


class Payload:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize(
    "arrays",
    [
        None,
        {"mean": np.zeros(3)},
        {"mean": np.zeros(3), "projection": np.zeros((4, 2)), "learned_on": np.frombuffer(b"{}", np.uint8)},
        {"mean": np.full(3, np.nan), "projection": np.zeros((3, 2)), "learned_on": np.frombuffer(b"{}", np.uint8)},
        {"mean": np.zeros(3), "projection": np.zeros((3, 2)), "learned_on": np.frombuffer(b"[]", np.uint8)},
        {"mean": np.zeros(3), "projection": np.zeros((3, 2)), "learned_on": np.frombuffer(b"{", np.uint8)},
        {"mean": np.zeros(3), "projection": np.eye(3), "learned_on": np.frombuffer(b"[" * 99_999, np.uint8)},
        {"mean": np.zeros(3), "projection": np.eye(3), "learned_on": np.frombuffer(b'{"provenance": []}', np.uint8)},
        {"mean": np.zeros(3), "projection": np.eye(3), "learned_on": np.frombuffer(b"9" * 5000, np.uint8)},
        {"mean": np.array([Payload()]), "projection": np.zeros((3, 2)), "learned_on": np.frombuffer(b"{}", np.uint8)},
    ],
)
def test_files_that_are_no_whitening(tmp_path, monkeypatch, arrays):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.npz"
    path.write_bytes(b"PK nothing") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(ValueError, match="w.npz: not a whitening"):
        whitening.read(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="no such whitening; evaler/whiten.py learns one"):
        whitening.read(tmp_path / "absent.npz")


# ------------------------------------------------------------------------------------------- neighbours, and rows


def test_expansion_by_hand():
    images = unit([[1, 0], [0, 1], [-1, 0]])
    query = unit([[0.8, 0.6]])
    np.testing.assert_allclose(expand(query, images, neighbours=2, alpha=0), unit([[1.8, 1.6]]), atol=1e-6)
    np.testing.assert_allclose(expand(query, images, neighbours=1, alpha=3), unit([[0.8 + 0.512, 0.6]]), atol=1e-6)
    # The third is opposite: with a positive power it counts nothing.
    both = [expand(query, images, neighbours=n, alpha=1) for n in (2, 3)]
    np.testing.assert_array_equal(*both)


def test_augmentation_leaves_each_image_out_of_its_own_neighbours(monkeypatch):
    monkeypatch.setattr("evaler.refinement.expansion.QUERIES_AT_ONCE", 7)
    rows = SKEWED[:30]
    found = augment(rows, neighbours=3, alpha=2)
    for number, row in enumerate(rows.astype(np.float64)):
        scores = rows @ row
        scores[number] = -9
        best = np.argsort(-scores, kind="stable")[:3]
        moved = row + (np.maximum(scores[best], 0) ** 2) @ rows[best]
        np.testing.assert_allclose(found[number], moved / np.linalg.norm(moved), atol=1e-6)


def test_stacked_rows_are_those_of_the_whole():
    parts = [SKEWED[:7], SKEWED[7:7], SKEWED[7:50].astype(np.float16), SKEWED[50:60]]
    whole = np.concatenate([part.astype(np.float32) for part in parts])
    stacked = Stacked(parts)
    assert stacked.shape == (60, 6)
    for start in range(0, 60, 3):
        for stop in (start + 1, start + 9, start + 99):
            np.testing.assert_array_equal(stacked[start:stop], whole[start:stop])
    index = RNG.integers(0, 60, 40)
    np.testing.assert_array_equal(stacked[index], whole[index])
    doubled = Mapped(stacked, lambda rows: 2 * rows[:, :2], 2)
    np.testing.assert_array_equal(doubled[3:55], 2 * whole[3:55, :2])
    assert doubled.shape == (60, 2)


# ------------------------------------------------------------------------------------------------------ re-ranking


def slow_rerank(query, database, candidates, neighbours, beta):
    """SuperGlobal's, a step at a time."""
    found = sorted(range(len(database)), key=lambda i: (-float(query @ database[i]), i))[:candidates]
    refined = {}
    for one in found:
        others = sorted((o for o in found if o != one), key=lambda o: -float(database[one] @ database[o]))[:neighbours]
        total, weights = database[one].copy(), 1.0
        for other in others:
            weight = beta * float(database[one] @ database[other])
            total, weights = total + weight * database[other], weights + weight
        refined[one] = total / weights
    by_query = sorted(found, key=lambda i: -float(query @ refined[i]))
    expanded = np.max([refined[i] for i in by_query[: neighbours + 1]], axis=0)
    return sorted(by_query, key=lambda i: -float(query @ refined[i] + expanded @ refined[i]) / 2)


@pytest.mark.parametrize(("candidates", "neighbours"), [(30, 9), (30, 1), (5, 9), (1, 9), (500, 3)])
def test_reranking_against_a_slower_one(candidates, neighbours):
    queries, database = SKEWED[:8], SKEWED[8:120]
    found = rerank(queries, database, candidates=candidates, neighbours=neighbours, beta=0.15)
    for query, order in zip(queries.astype(np.float64), found.tolist(), strict=True):
        assert order == slow_rerank(query, database.astype(np.float64), candidates, neighbours, 0.15)
    assert found.shape == (8, min(candidates, 112))
    assert candidates == 1 or (found[:, 1:] != found[:, :1]).all()


def test_reranking_lifts_what_the_first_images_agree_on():
    """Images 0 to 5 are one place; the query sees 6, a stranger, before 5."""
    angles = np.radians([0, 4, 8, 12, 16, 34, -32])
    database = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert np.argsort(-database @ [1, 0]).tolist() == [0, 1, 2, 3, 4, 6, 5]
    assert rerank(np.array([[1.0, 0]]), database, candidates=7, neighbours=3, beta=1).tolist()[0][-2:] == [5, 6]


# ------------------------------------------------------------------------------------------------ the whole of it


def refinement(*settings):
    return Refinement.of(load_cfg(None, list(settings)))


def test_nothing_switched_on_changes_nothing():
    none = refinement()
    queries, database, first = none.apply(SKEWED[:2], SKEWED[2:])
    assert not none and none.lines([]) == [] and first is None
    np.testing.assert_array_equal(queries, SKEWED[:2])
    np.testing.assert_array_equal(database, SKEWED[2:])


def test_the_order_is_whitening_augmentation_expansion_reranking(tmp_path):
    learned = Whitening(*learn(SKEWED, dim=4), {"set": "x", "npy_sha256": "1"})
    whitening.write(tmp_path / "w.npz", learned)
    settings = ["SCORE.QE", "3", "SCORE.QE_ALPHA", "0", "SCORE.DBA", "2", "SCORE.DBA_ALPHA", "1"]
    moving = refinement(*settings, "SCORE.WHITENING", str(tmp_path / "w.npz"))
    queries, moved, first = moving.apply(SKEWED[:5], Stacked([SKEWED[5:40], SKEWED[40:90]]))
    images = augment(learned(SKEWED[5:90]), neighbours=2, alpha=1)
    np.testing.assert_allclose(moved, images, atol=1e-6)
    np.testing.assert_allclose(queries, expand(learned(SKEWED[:5]), images, neighbours=3, alpha=0), atol=1e-6)
    assert moving.lines(["2"]) == ["PCA whitening to 4 (learned on x)", "DBA 2 alpha 1", "QE 3 alpha 0"]
    assert "THE SCORED SET ITSELF" in moving.lines(["1"])[0]
    assert first is None
    reranking = refinement(*settings, "SCORE.WHITENING", str(tmp_path / "w.npz"), "SCORE.RERANK", "20")
    assert reranking.lines([])[3] == "SuperGlobal re-ranking of 20 (9 neighbours, beta 0.15)"
    _, _, first = reranking.apply(SKEWED[:5], Stacked([SKEWED[5:40], SKEWED[40:90]]))
    np.testing.assert_array_equal(first, rerank(queries, moved, candidates=20, neighbours=9, beta=0.15))


def test_a_step_of_ones_own_costs_a_class_and_a_row(monkeypatch):
    class Reversed(Step):
        """The ranking that the steps before left, backwards."""

        @classmethod
        def of(cls, cfg):
            return cls()

        def line(self, scored):
            return "reversed"

        def ranking(self, queries, database, first):
            return first[:, ::-1]

    monkeypatch.setattr(steps, "STEPS", (*steps.STEPS, Reversed))
    both = refinement("SCORE.RERANK", "7", "SCORE.RERANK_NEIGHBOURS", "2")
    assert both.lines([])[1] == "reversed"
    wanted = rerank(SKEWED[:3], SKEWED[3:], candidates=7, neighbours=2, beta=0.15)[:, ::-1]
    np.testing.assert_array_equal(both.apply(SKEWED[:3], SKEWED[3:])[2], wanted)


def test_a_whitening_of_other_descriptors_is_refused():
    other = Refinement((WhiteningStep(Whitening(*learn(SKEWED), {"provenance": {"weights_sha256": "a"}})),))

    def described(dim=6, **provenance):
        return Features(["x"], np.ones((1, dim), np.float32), np.ones((1, 2), np.int32), Provenance(**provenance))

    other.check(described(weights_sha256="a", crop_query=True, list_sha256="l", torch="2"))
    with pytest.raises(FeaturesError, match="differs in weights_sha256"):
        other.check(described(weights_sha256="b"))
    with pytest.raises(FeaturesError, match="differs in dimension, 6 and 8"):
        other.check(described(8, weights_sha256="a"))
