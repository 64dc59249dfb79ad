import os

import pytest

from core.base.errors import UserError
from core.checkpoints.output import check_writable, log_file, output_folder, write_config
from core.config import load_cfg


def mistake():
    raise UserError("the user's")


def defect():
    raise RuntimeError("ours")


def interrupt():
    raise KeyboardInterrupt


FAILURES = [mistake, defect, interrupt]


@pytest.fixture
def cfg(tmp_path):
    return load_cfg(None, ["OUT_DIR", str(tmp_path / "runs" / "first"), "LOG_DEST", "file"])


def save_something(cfg):
    folder = os.path.join(cfg.OUT_DIR, "checkpoints")
    os.makedirs(folder)
    open(os.path.join(folder, "model_epoch_0001.pyth"), "w").close()


def run(cfg, *parts):
    with output_folder(cfg):
        for part in parts:
            part()


def test_a_run_leaves_its_configuration(cfg, tmp_path):
    run(cfg, lambda: write_config(cfg))
    saved = tmp_path / "runs" / "first" / "config.yaml"
    assert load_cfg(saved) == cfg
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]


def test_nothing_is_made_by_entering(cfg, tmp_path):
    run(cfg)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(cfg, tmp_path, failure):
    def half_made():
        os.mkdir(os.path.join(cfg.OUT_DIR, "checkpoints"))

    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        run(cfg, lambda: write_config(cfg), half_made, failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_before_it_made_anything(cfg, tmp_path, failure):
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        run(cfg, failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_folders_that_were_there_stay(cfg, tmp_path, failure):
    (tmp_path / "runs").mkdir()
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        run(cfg, lambda: write_config(cfg), failure)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_an_out_dir_that_was_there_stays_with_its_files(cfg, tmp_path, failure):
    out_dir = tmp_path / "runs" / "first"
    out_dir.mkdir(parents=True)
    (out_dir / "notes.txt").touch()
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        run(cfg, lambda: write_config(cfg), failure)
    assert (out_dir / "notes.txt").exists()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_checkpoint_keeps_everything(cfg, failure):
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        run(cfg, lambda: write_config(cfg), lambda: save_something(cfg), failure)
    assert sorted(os.listdir(cfg.OUT_DIR)) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(("failure", "left"), [(mistake, None), (defect, ["config.yaml", "stdout.log"])])
def test_a_log_stays_unless_the_message_was_printed(cfg, failure, left):
    def write_log():
        log_file(cfg).write_text("what happened")

    with pytest.raises((ValueError, RuntimeError)):
        run(cfg, lambda: write_config(cfg), write_log, failure)
    assert (sorted(os.listdir(cfg.OUT_DIR)) if os.path.exists(cfg.OUT_DIR) else None) == left


def test_what_another_wrote_meanwhile_stays(cfg, tmp_path):
    def another():
        (tmp_path / "runs" / "first" / "features").mkdir()

    with pytest.raises(ValueError):
        run(cfg, lambda: write_config(cfg), another, mistake)
    assert (tmp_path / "runs" / "first" / "features").is_dir()


def test_a_file_in_its_place_is_refused(cfg, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").touch()
    with pytest.raises(ValueError, match="OUT_DIR .*first is a file, name a folder"):
        run(cfg)


def test_a_file_in_place_of_its_parent_is_refused(cfg, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(ValueError, match="OUT_DIR .*first cannot be written: (Not a directory|File exists)"):
        run(cfg, lambda: write_config(cfg))
    assert (tmp_path / "runs").is_file()


def test_the_log_file(cfg):
    assert str(log_file(cfg)) == os.path.join(cfg.OUT_DIR, "stdout.log")


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        check_writable(tmp_path / "file" / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ValueError, match=f"no permission in {tmp_path}; name another OUT_DIR"):
        check_writable(tmp_path / "a" / "b")
