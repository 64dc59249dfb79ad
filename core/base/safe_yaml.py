"""The one reader of YAML, for settings files and for the configurations inside weight files.

PyYAML's safe loader runs no code, but a few hundred bytes of aliases stand for a tree without end, deep nesting
overflows Python's stack, and a value that its tag does not fit raises anything.
"""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

from core.base.errors import UserError

MOST_TEXT = 200_000  # characters; a complete configuration has 6,000
MOST_NODES = 20_000  # with what an alias stands for counted each time
DEEPEST = 20
LARGEST_INT = 2**63
KINDS = ("map", "seq", "str", "int", "float", "bool", "null")


class YamlError(UserError):
    """Text that is no YAML of plain values; `problem` is one line, `line` counts from 1, None where it is not known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(f"line {line}: {problem}" if line else problem)
        self.problem, self.line = problem, line


def read_yaml(text: str) -> Any:
    """Mappings, lists, text, numbers, booleans and None. Raises `YamlError`; time and memory are bounded."""
    if len(text) > MOST_TEXT:
        raise YamlError(f"it has more than the {MOST_TEXT:,} characters of any configuration")
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join(f"{error.context or ''} {error.problem}".split())[:200]
        raise YamlError(problem, mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())[:200]) from None


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes below each finished node, by its id

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._nodes
        mark = event.start_mark
        self._depth += 1
        if self._depth > DEEPEST:
            raise ConstructorError(None, None, f"it is nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._nodes += 1
        elif id(node) in self._sizes:
            self._nodes += self._sizes[id(node)]
        else:
            raise ConstructorError(None, None, f"*{event.anchor} stands inside what it refers to", mark)
        if self._nodes > MOST_NODES:
            raise ConstructorError(None, None, f"it stands for more than {MOST_NODES:,} values", mark)
        self._sizes.setdefault(id(node), self._nodes - before)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError):  # !!int abc; thousands of digits
            problem = f"{str(node.value)[:40]!r} is not of kind {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, problem, node.start_mark) from None
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            raise ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """PyYAML takes the last of equal keys and forgets the others: half a configuration could go unread."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)) if _is_mapping(node) else ():
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value[:100]} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def refuse(self, node: yaml.Node) -> None:
        kind = node.tag.rpartition(":")[2][:60]
        mend = "; write it in quotes" if kind == "timestamp" else ""
        raise ConstructorError(None, None, f"a value of kind {kind!r} is no setting{mend}", node.start_mark)


def _is_mapping(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)


_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in KINDS]
_PlainLoader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}
_PlainLoader.add_constructor(None, _PlainLoader.refuse)
