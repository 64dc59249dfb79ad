from pathlib import Path

import pytest

from core.arguments import load_cfg_from_args, parse, split_settings
from core.base.arguments import Parser
from core.config import PATHS, ConfigError, find, get_cfg, load_cfg


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "rest", "settings"),
    [
        (["a", "b.jpg", "NUM_GPUS", "0"], ["a", "b.jpg"], ["NUM_GPUS", "0"]),
        (["OUT_DIR", "x", "--top", "3", "a"], ["--top", "3", "a"], ["OUT_DIR", "x"]),
        (["a", "INFER.NUM_WORKERS", "-1", "--json", "f"], ["a", "--json", "f"], ["INFER.NUM_WORKERS", "-1"]),
        (["TEST.SPLIT", "TRAIN.SPLIT"], [], ["TEST.SPLIT", "TRAIN.SPLIT"]),
        (["SEARCH", "INFER.SCALES", "[1]"], ["SEARCH"], ["INFER.SCALES", "[1]"]),
        (["SEARCH.jpg", "TRAIN.JPEG", "0"], ["SEARCH.jpg"], ["TRAIN.JPEG", "0"]),  # told of as an unknown key
        (["train.batch_size", "4", "port", "IMG.JPG"], ["port", "IMG.JPG"], ["train.batch_size", "4"]),
        (["PREC_TIME.NUM_ITER", "3"], [], ["PREC_TIME.NUM_ITER", "3"]),
        (["a", "OUT_DIR"], ["a"], ["OUT_DIR"]),
        ([], [], []),
    ],
)
def test_settings_and_the_rest(arguments, rest, settings):
    assert split_settings(arguments) == (rest, settings)


def test_a_file_with_the_name_of_a_key_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.weights").touch()
    assert split_settings(["train.weights", "x"]) == (["train.weights", "x"], [])


def test_options_behind_settings_and_between_file_names():
    parser = Parser()
    parser.add_argument("--top", type=int)
    parser.add_argument("index", type=Path)
    parser.add_argument("queries", type=Path, nargs="+")
    args, settings = parse(parser, ["set", "a.jpg", "NUM_GPUS", "0", "--top", "5", "b.jpg"])
    assert (args.index, args.queries, args.top) == (Path("set"), [Path("a.jpg"), Path("b.jpg")], 5)
    assert settings == ["NUM_GPUS", "0"]


def test_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as raised:
        Parser(prog="x").parse_args(["--unheard\x1b[2J", "of"])
    assert raised.value.code == 2
    assert capsys.readouterr().err == ("error: unrecognized arguments: --unheard\\x1b[2J of (--help shows the usage)\n")


def test_an_option_of_no_command_and_a_setting_that_is_none(tmp_path):
    cfg = tmp_path / "some.yaml"
    cfg.write_text("NUM_GPUS: 0\n")
    assert load_cfg_from_args("", ["OUT_DIR", "x", "--cfg", str(cfg), "TRAIN.BATCH_SIZE", "4"]).TRAIN.BATCH_SIZE == 4
    with pytest.raises(ConfigError, match=r"unknown key NUM_GPU; did you mean NUM_GPUS\?$"):
        load_cfg_from_args("", ["--cfg", str(cfg), "NUM_GPU", "1"])
    with pytest.raises(ConfigError, match="unknown key photos"):
        load_cfg_from_args("", ["--cfg", str(cfg), "OUT_DIR", "my", "photos"])
    with pytest.raises(ConfigError, match="'OUT_DIR' stands alone"):
        load_cfg_from_args("", ["--cfg", str(cfg), "OUT_DIR"])


def test_the_home_folder_is_put_for_a_tilde_in_every_path(home):
    for key in PATHS:
        assert find(load_cfg(None, [key, "~/x y"]), key) == str(home / "x y")
        assert find(load_cfg(None, [key, "x~y/~"]), key) == "x~y/~"
        with pytest.raises(ConfigError, match=f"{key} ~nobody-here/x: there is no user of that name"):
            load_cfg(None, [key, "~nobody-here/x"])
        with pytest.raises(ConfigError, match=rf"{key} 'a\\x00b': "):
            load_cfg(None, [key, "a\0b"])


def test_the_home_folder_in_an_option(home):
    parser = Parser()
    parser.add_argument("--json", type=Path)
    assert parser.parse_args(["--json=~/a.json"]).json == home / "a.json"


def test_no_path_of_the_configuration_is_forgotten():
    """Keys that name a file or a folder, by their names; DATASET and SPLIT are names below DATA_DIR."""
    ends = ("_DIR", "WEIGHTS", "IMAGES", "WHITENING", "URI")
    assert sorted(key for key in _texts(get_cfg()) if key.endswith(ends)) == sorted(PATHS)


def _texts(node, prefix=""):
    for name, value in node.items():
        yield from _texts(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
