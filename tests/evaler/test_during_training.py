"""mAP in the course of training is that of extraction and scoring."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoints.checkpoint import checkpoints
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.trainer import train
from evaler import during_training
from evaler.during_training import check_sets, score_sets
from evaler.extraction import command as extract
from evaler.extraction.pictures import decoded
from evaler.scoring import revisited as score
from tests.small_run import (
    SMALL_MODEL,
    SMALL_TRAINING,
    landmarks,
    overrides,
    photograph,
    retrieval_set,
    write_image,
)


@pytest.fixture
def args(tmp_path):
    retrieval_set(landmarks(tmp_path / "data", train=8, val=2), "toy", queries=3, database=7)
    data = tmp_path / "data"
    place = {"DATA_LOADER.DATA_DIR": data, "INFER.DATA_DIR": data, "OUT_DIR": tmp_path / "out"}
    more = {"INFER.DATASETS": "['toy']", "TEST.RETRIEVAL": "['toy']", "INFER.SCALES": "[0.7071, 1.0]"}
    return overrides(SMALL_MODEL, SMALL_TRAINING, place, more, {"OPTIM.MAX_EPOCH": 1, "OPTIM.BASE_LR": 0.001})


@pytest.mark.parametrize(("workers", "batch"), [(0, 1), (2, 3)])
def test_training_reports_the_map_that_extraction_and_scoring_give(args, tmp_path, capsys, workers, batch):
    args += ["INFER.NUM_WORKERS", str(workers), "INFER.BATCH_SIZE", str(batch)]
    cfg = load_cfg(None, args)
    try:
        train(cfg, score_sets)
    finally:
        setup_logging(None, quiet=True)
    (said,) = [r for r in read_stats(capsys.readouterr().out.splitlines()) if r["_type"] == "retrieval"]
    assert (said["set"], said["epoch"]) == ("toy", "1/1")
    (tmp_path / "empty.yaml").touch()
    for main in (extract.main, score.main):
        main(["--cfg", str(tmp_path / "empty.yaml"), *args])
    scored = json.loads((tmp_path / "out" / "scores" / "toy.json").read_text())
    for key, letter in (("easy", "E"), ("medium", "M"), ("hard", "H")):
        assert said[key] == pytest.approx(scored[letter]["mAP"], rel=1e-5)
    content = torch.load(checkpoints(cfg.OUT_DIR)[-1], weights_only=True)
    assert content["run"]["best_score"] == pytest.approx(said["medium"], rel=1e-5)


def test_scores_come_from_the_engine_of_extraction(args, monkeypatch):
    """As many pictures together and workers as INFER says, no timing of algorithms, a poll before each image."""
    described, workers, polls = [], [], []

    def describe(network, pixels, **settings):
        described.append((len(pixels), torch.backends.cudnn.benchmark))
        return np.eye(len(pixels), 8, dtype=np.float32)

    def watched(pictures, indices, **settings):
        workers.append(settings["workers"])
        return decoded(pictures, indices, **settings | {"workers": 0})

    monkeypatch.setattr(during_training, "describe_batch", describe)
    monkeypatch.setattr(during_training, "decoded", watched)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    same = ["INFER.CROP_QUERY", "False", "INFER.BATCH_SIZE", "2", "INFER.NUM_WORKERS", "3"]
    cfg = load_cfg(None, [*args, *same])
    for index in range(7):
        write_image(Path(cfg.INFER.DATA_DIR) / "toy" / "jpg" / f"image{index}.jpg", photograph(index, 40, 48))
    score_sets(cfg, torch.nn.Linear(1, 1), lambda: polls.append(1))
    assert described[-4:] == [(2, False)] * 3 + [(1, False)]
    assert sum(size for size, _ in described) == 10
    assert len(polls) == 10 + 2 * 2
    assert workers == [3, 3]
    assert torch.backends.cudnn.benchmark


def test_a_descriptor_that_is_not_finite_gives_no_scores(args, monkeypatch, capsys):
    vectors = iter(np.eye(10, 16, dtype=np.float32) * np.where(np.arange(10) == 4, np.nan, 1)[:, None])
    monkeypatch.setattr(during_training, "describe_batch", lambda network, pixels, **_: next(vectors)[None])
    setup_logging(None)
    try:
        scores = score_sets(load_cfg(None, [*args, "INFER.NUM_WORKERS", "0"]), torch.nn.Linear(1, 1), lambda: None)
    finally:
        setup_logging(None, quiet=True)
    assert scores == {"toy": {"easy": None, "medium": None, "hard": None}}
    assert "toy is not scored: " in (said := capsys.readouterr().out) and "has length nan, not 1" in said


def test_a_set_that_lacks_an_image_is_noticed_before_training(args, tmp_path):
    check_sets(load_cfg(None, args))
    (tmp_path / "data" / "toy" / "jpg" / "image3.jpg").unlink()
    with pytest.raises(ValueError, match=r"image3\.jpg: no such image"):
        check_sets(load_cfg(None, args))
