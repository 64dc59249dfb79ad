"""Reading values into a configuration: YAML files and `KEY VALUE` overrides, typed by the default they replace.

YACS' own merge stops at `OPTIM.BASE_LR 1` (an integer) and names no file; this one says where a value stands.
"""

import ast
import contextlib
import difflib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from core.base.errors import UserError
from core.base.safe_yaml import LARGEST_INT, MOST_TEXT, YamlError, read_yaml
from core.base.terminal import reason_of

# Keys of pycls and of the published YAML files that nothing reads (most were not read there either).
IGNORED = {
    "ANYNET": "another backbone family of pycls",
    "REGNET": "another backbone family of pycls",
    "EN": "another backbone family of pycls",
    "PREC_TIME": "pycls' timing mode",
    "MODEL.S2_DIM": "no branch uses f2",
    "MODEL.HEADS.NAME": "there is one head layout",
    "MODEL.HEADS.NUM_CLASSES": "MODEL.NUM_CLASSES is the one that counts",
    "MODEL.HEADS.POOL_LAYER": "the global branch pools with GeM",
}
# What the published configurations say in `CLS_LAYER` without its being read.
NEVER_READ_CLS_LAYER = "linear"


class ConfigError(UserError):
    """A configuration the user has to mend; the message is one line."""


def merge_yaml(cfg: CfgNode, path: Path, *, defaults: CfgNode) -> list[str]:
    """Merge a YAML file into `cfg`; return the notes about keys without effect."""
    try:
        # A weight file named by mistake is not read to its end, nor a pipe that nobody writes to.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: cannot be read as a configuration file: it is no file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_TEXT + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (see configs/)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {reason_of(error)}") from None
    try:
        tree = read_yaml(text)
    except YamlError as error:
        line = f" line {error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is a {type(tree).__name__}")
    return _merge_tree(cfg, defaults, tree, "", str(path))


def _merge_tree(cfg: CfgNode, defaults: CfgNode, tree: dict, prefix: str, source: str) -> list[str]:
    notes = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in IGNORED and isinstance(value, dict) and isinstance(find(defaults, key), CfgNode):
            notes += _merge_tree(cfg, defaults, value, f"{key}.", source)
        else:
            notes += _set(cfg, defaults, key, value, source)
    return notes


def merge_overrides(cfg: CfgNode, overrides: list[str], *, defaults: CfgNode) -> list[str]:
    """Merge `KEY VALUE KEY VALUE ...` from a command line into `cfg`; return the notes."""
    if len(overrides) % 2:
        raise ConfigError(f"settings are given as KEY VALUE pairs, but {overrides[-1]!r} stands alone")
    notes = []
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        value = text if isinstance(find(defaults, key), str) else _literal(text)
        notes += _set(cfg, defaults, key, value, "the command line")
    return notes


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # anything that is no value is text
        return text


def is_ignored(key: str) -> str:
    """The part of a dotted key, from its beginning, that stands in `IGNORED`; empty where none does."""
    return next((ignored for ignored in IGNORED if f"{key}.".startswith(f"{ignored}.")), "")


def find(cfg: CfgNode, key: str) -> Any:
    """The value at a dotted key, None where there is none (no default is None)."""
    node = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            return None
        node = node[name]
    return node


def _set(cfg: CfgNode, defaults: CfgNode, key: str, value: Any, source: str) -> list[str]:
    ignored = is_ignored(key)
    if ignored:
        return [f"{source}: {ignored} is ignored: {IGNORED[ignored]}"]
    default = find(defaults, key)
    if default is None:
        raise ConfigError(f"{source}: unknown key {key}{suggestion(defaults, key)}")
    if isinstance(default, CfgNode):
        raise ConfigError(f"{source}: {key} is a section, give one of its keys: {', '.join(default)}")
    section, _, name = key.rpartition(".")
    node = find(cfg, section) if section else cfg
    if key == "MODEL.HEADS.CLS_LAYER" and value == NEVER_READ_CLS_LAYER:
        node[name] = default
        return [f"{source}: {key} {value} was never read by the published code; the default {default} is used"]
    node[name] = _typed(default, value, key, source)
    return []


def suggestion(cfg: CfgNode, key: str) -> str:
    """What may have been meant by an unknown key, as the end of a message."""
    known = list(_keys(cfg)) + list(IGNORED)
    near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section
        near = [k for k in known if k.rpartition(".")[2] == key.upper().rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else "; core/config.py lists all keys"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """All keys, sections included."""
    for name, value in cfg.items():
        yield f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _typed(default: Any, value: Any, key: str, source: str) -> Any:
    """`value` as the type of `default`, without losing anything."""
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool) and -LARGEST_INT < value < LARGEST_INT:
            return value
    elif isinstance(default, float):
        # PyYAML reads 1e-4 (no dot) as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                return float(value)
    elif isinstance(default, str):
        if isinstance(value, str):
            return value
    elif isinstance(default, list):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        kind = default[0] if default else ""  # an empty list is one of names
        if isinstance(value, list | tuple):
            return [_typed(kind, item, key, source) for item in value]
        return [_typed(kind, value, key, source)]
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}
    raise ConfigError(f"{source}: {key} takes {expected[type(default)]}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """In a message: whatever its length."""
    if isinstance(value, int) and not -LARGEST_INT < value < LARGEST_INT:
        return "a number of more than 64 bits"  # Python refuses to print thousands of digits
    return reprlib.repr(value)
