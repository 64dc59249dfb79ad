"""mAP in the course of training is that of extraction and scoring."""

import json

import pytest
import torch

from core.checkpoint import checkpoints
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.trainer import train
from evaler import extract, score
from evaler.during_training import check_sets, score_sets
from tests.small_run import SMALL_MODEL, SMALL_TRAINING, landmarks, overrides, retrieval_set


@pytest.fixture
def args(tmp_path):
    retrieval_set(landmarks(tmp_path / "data", train=8, val=2), "toy", queries=3, database=7)
    data = tmp_path / "data"
    place = {"DATA_LOADER.DATA_DIR": data, "INFER.DATA_DIR": data, "OUT_DIR": tmp_path / "out"}
    more = {"INFER.DATASETS": "['toy']", "TEST.RETRIEVAL": "['toy']", "INFER.SCALES": "[0.7071, 1.0]"}
    return overrides(SMALL_MODEL, SMALL_TRAINING, place, more, {"OPTIM.MAX_EPOCH": 1, "OPTIM.BASE_LR": 0.001})


def test_training_reports_the_map_that_extraction_and_scoring_give(args, tmp_path, capsys):
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


def test_a_set_that_lacks_an_image_is_noticed_before_training(args, tmp_path):
    check_sets(load_cfg(None, args))
    (tmp_path / "data" / "toy" / "jpg" / "image3.jpg").unlink()
    with pytest.raises(ValueError, match=r"image3\.jpg: no such image"):
        check_sets(load_cfg(None, args))
