"""What the environment says of a process's place in its run: right, half said, or nonsense."""

import pytest

import train
from core.config import load_cfg
from core.config_checks import ConfigError, check_split
from core.processes import meeting
from core.processes.place import NUMBERS, Place, device_index, place

VARIABLES = (*NUMBERS, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")
FIRST_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(meeting, "NAME_TIMEOUT", 0.0)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE is '٣'"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but not RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "7"}, "not LOCAL_RANK"),
        ({"RANK": "1"}, "not WORLD_SIZE, LOCAL_RANK"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "not RANK, WORLD_SIZE, LOCAL_RANK"),
        (FIRST_OF_TWO | {"RANK": "7"}, "RANK is 7: it must be below WORLD_SIZE, which is 2"),
        (FIRST_OF_TWO | {"RANK": "-1"}, "RANK is '-1'"),
        (FIRST_OF_TWO | {"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE is 'many'"),
        (FIRST_OF_TWO, "MASTER_PORT is ''"),
        (FIRST_OF_TWO | {"MASTER_PORT": "http", "MASTER_ADDR": "localhost"}, "MASTER_PORT is 'http'"),
        (FIRST_OF_TWO | {"MASTER_PORT": "29500", "MASTER_ADDR": "a b"}, "MASTER_ADDR is 'a b'"),
        (FIRST_OF_TWO | {"MASTER_PORT": "29500", "MASTER_ADDR": "none.invalid"}, "none.invalid names no machine"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS is 'many'"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(tmp_path, monkeypatch, capsys, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "empty.yaml").touch()
    settings = ["--cfg", str(tmp_path / "empty.yaml"), "NUM_GPUS", "0", "OUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        train.main(settings)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: the environment") and said.count("\n") == 1 and named in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": ""}, None),
        (FIRST_OF_TWO, Place(0, 2, 0)),
        ({"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}, Place(5, 6, 2, 3)),
    ],
)
def test_a_place(monkeypatch, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == found


def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_it_sees():
    assert [device_index(3, 8), device_index(3, 1), device_index(0, 2)] == [3, 0, 0]
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU: 2 can be used here"):
        device_index(3, 2)


def test_two_processes_with_one_gpu_are_refused():
    with pytest.raises(ValueError, match=r"3 processes share 2 GPUs \(a is taken twice\)"):
        meeting._check_devices(["1|a", "2|b", "3|a"])
    meeting._check_devices(["1|", "2|"])  # on the CPU there are none


@pytest.mark.parametrize(
    ("overrides", "processes", "refused"),
    [
        ("TRAIN.BATCH_SIZE 12", 8, "TRAIN.BATCH_SIZE 12 does not divide by the run's 8 processes"),
        ("TRAIN.BATCH_SIZE 12 TRAIN.ACCUM_STEPS 2", 4, "TRAIN.ACCUM_STEPS 2 does not divide .* 3 images"),
        ("TRAIN.BATCH_SIZE 4 TRAIN.IM_SIZE 32", 4, "gives batch norm one image at a time"),
        ("TRAIN.BATCH_SIZE 4 TRAIN.IM_SIZE 32 TRAIN.ACCUM_STEPS 4", 1, "gives batch norm one image at a time"),
        ("TRAIN.BATCH_SIZE 4 TRAIN.IM_SIZE 64", 4, None),
        ("TRAIN.BATCH_SIZE 4 TRAIN.IM_SIZE 32 TRAIN.FREEZE_BN True", 4, None),
        ("TRAIN.BATCH_SIZE 4 TRAIN.IM_SIZE 32", 2, None),
    ],
)
def test_a_batch_that_cannot_be_split_over_the_processes_that_there_are(overrides, processes, refused):
    arguments = ["NUM_GPUS", "0", *overrides.split()]
    if refused is None:
        check_split(load_cfg(None, arguments), processes)
        return
    with pytest.raises(ConfigError, match=refused):
        check_split(load_cfg(None, arguments), processes)
