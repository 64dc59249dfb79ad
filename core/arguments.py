"""Command lines: options, file names and `KEY VALUE` settings in any order."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from core.base.arguments import Parser
from core.config import ConfigError, is_known, is_section, load_cfg, nearest


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command and its settings, `KEY VALUE ...`, which may stand before, between and behind them."""
    arguments, settings = split_settings(sys.argv[1:] if argv is None else argv)
    return parser.parse_intermixed_args(arguments), settings


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is not a setting, and `KEY VALUE ...`; a key that no value follows stands there alone."""
    rest, settings = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if is_key(argument):
            settings += [argument, *([value] if (value := next(waiting, None)) is not None else [])]
        else:
            rest.append(argument)
    return rest, settings


def is_key(text: str) -> bool:
    """Whether an argument is a setting's key, or was meant as one: `TRAIN.BATCHSIZE`, `train.batch_size`."""
    section, dot, _ = text.partition(".")
    written_as_key = is_known(text) or bool(dot and text.isupper() and is_section(section))
    return written_as_key or bool(dot and is_known(text.upper()) and not os.path.exists(text))


def load_cfg_from_args(description: str, argv: Sequence[str] | None = None) -> CfgNode:
    """Parse `--cfg FILE [KEY VALUE ...]`; see `load_cfg`."""
    parser = Parser(description=description)
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("rest", nargs="*", metavar="KEY VALUE", help="settings that win over FILE")
    args, settings = parse(parser, argv)
    if args.rest:
        raise ConfigError(f"the command line: unknown key {args.rest[0]}{nearest(args.rest[0])}")
    return load_cfg(args.cfg, settings)
