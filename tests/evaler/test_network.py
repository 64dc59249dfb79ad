"""The loader of networks: what PyTorch shares stays as the program has it, and only a command's `main` changes it."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from core.config import load_cfg
from evaler import describer, network
from evaler.extraction import command as extract
from evaler.features.provenance import Provenance, Purpose
from evaler.features.store import Features
from evaler.indexing.search import describe_files
from evaler.network import without_tf32
from evaler.pages.attention_maps import attention_map, load_network
from model.dolg import DOLG
from tests.evaler.test_describer import write_weights
from tests.small_run import SMALL_MODEL, overrides, photograph, write_image


def shared():
    """What all of PyTorch shares."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return torch.get_num_threads(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32


@pytest.fixture
def host(monkeypatch):
    """A program with settings of its own: all others than ours."""
    threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.backends.cuda.matmul.allow_tf32 = True
    yield shared()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = matmul


@pytest.fixture
def cfg(tmp_path):
    path = write_weights(tmp_path / "w.pyth", SMALL_MODEL)
    return load_cfg(None, overrides(SMALL_MODEL, {"NUM_GPUS": 0, "TEST.WEIGHTS": path, "INFER.THREADS": 1}))


def test_a_program_that_loads_a_network_keeps_its_settings(tmp_path, host, cfg):
    image = write_image(tmp_path / "a.png", photograph(0, 40, 48))
    for precision in ("fp32", "bf16"):
        describer.load(cfg.TEST.WEIGHTS, device="cpu", precision=precision)(image)
        assert shared() == host
    _, provenance = extract.load_network(cfg)
    attention_map(load_network(provenance), photograph(0, 40, 48))
    features = Features([], np.empty((0, 8), np.float32), np.empty((0, 2), np.int32), provenance)
    assert describe_files(cfg, features, [image])[0].shape == (1, 8)
    assert shared() == host


@pytest.fixture
def operators_apart(monkeypatch):
    """A program that sets the precision of convolutions alone, which PyTorch's common name cannot tell."""
    cudnn = torch.backends.cudnn
    allowed = cudnn.allow_tf32
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"
    yield
    cudnn.allow_tf32 = allowed  # of both operators


@pytest.mark.parametrize("setting", ["host", "operators_apart"])
def test_a_describer_computes_without_tf32_and_puts_it_back(request, tmp_path, cfg, setting):
    request.getfixturevalue(setting)
    cudnn, seen = torch.backends.cudnn, []

    def now():
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision

    before = now()
    for precision in ("fp32", "bf16"):
        describe = describer.load(cfg.TEST.WEIGHTS, device="cpu", precision=precision, scales=[1.0])
        describe.network.register_forward_pre_hook(lambda *_: seen.append((cudnn.allow_tf32, *now())))
        describe(photograph(0, 40, 48))
        with pytest.raises(ValueError, match="pixels are"):
            describe(np.zeros((4, 4)))
        assert now() == before
    assert seen == [(False, "ieee", "ieee")] * 2


def test_a_command_sets_them(host, cfg, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert network.claim_process(cfg) == torch.device("cpu")
    assert shared()[:2] == (1, False)
    assert warnings.formatwarning("slower", UserWarning, "file.py", 3, "source") == "warning: slower\n"


def test_a_gpu_that_is_not_there_is_noted_once(tmp_path, cfg, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_image(tmp_path / "photos" / "a.png", photograph(0, 40, 48))
    (tmp_path / "some.yaml").touch()
    keys = {"NUM_GPUS": 1, "TEST.WEIGHTS": cfg.TEST.WEIGHTS, "OUT_DIR": tmp_path, "INFER.IMAGES": tmp_path / "photos"}
    extract.main(["--cfg", str(tmp_path / "some.yaml"), *overrides(SMALL_MODEL, keys)])
    assert capsys.readouterr().err.count("NUM_GPUS is 1, but no GPU can be used") == 1


def test_plain_and_fast_form_are_of_one_file(cfg):
    loaded = network.load(cfg, "cpu")
    assert isinstance(loaded.plain, DOLG) and not loaded.plain.training and str(loaded.weights) == cfg.TEST.WEIGHTS
    images = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.arranged()(images), loaded.plain(images), rtol=0, atol=1e-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.plain = None


def test_a_file_and_its_configuration_give_one_provenance(cfg):
    """But for what the command sets: the describer asks for no crop of its own, and has the default threads."""
    by_cfg = network.load(cfg, "cpu").provenance
    by_file = network.load_file(cfg.TEST.WEIGHTS, "cpu").provenance
    assert by_file.differing(by_cfg, Purpose.SAME_SPACE) == {}
    assert by_cfg.threads == 1 and by_cfg.chunk_size is None and by_cfg.decoder is None and by_cfg.device == "CPU"
    recorded = {setting.name for setting in dataclasses.fields(Provenance) if getattr(by_cfg, setting.name)}
    assert recorded >= {"weights", "weights_sha256", "depth", "scales", "torch", "code_version", "batch_size"}


def test_calls_at_once_put_tf32_back_when_the_last_of_them_ends(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    one, other = without_tf32(), without_tf32()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert cudnn.allow_tf32 is False
    other.__exit__(None, None, None)
    assert cudnn.allow_tf32 is True
