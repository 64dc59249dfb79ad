"""A reader for pickles that hold plain data, with no way to run anything.

Ground truth comes from elsewhere, and a pickle is a program: the standard machine imports and calls what it names,
and even with every global forbidden a file of a dozen bytes can make it allocate gigabytes (LONG_BINPUT with a large
index) or overflow the C stack (hashing a deeply nested tuple). This one knows only the opcodes that build lists,
dicts with text keys, tuples, text, bytes, numbers, booleans and None; there is no code here for any other.
"""

import pickletools
from typing import Any

from revisitop.errors import ProtocolError

_NOTHING = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_FROM_MARK = {"LIST", "DICT", "TUPLE", "APPENDS", "SETITEMS"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


class PlainPickleError(ProtocolError):
    """The bytes are not a pickle, or hold more than plain data."""


def loads(data: bytes) -> Any:
    """Return the plain data in a pickle of any protocol.

    Text of Python 2 and bytes become str (UTF-8 where they are valid UTF-8, else Latin-1). Raises `PlainPickleError`
    for anything but plain data. Memory grows with the length of the data, not with the numbers written in it.
    """
    try:
        return _Machine().run(data)
    except PlainPickleError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # of pickletools, or a stack that does not hold what it should
        raise PlainPickleError(f"damaged or not a pickle ({type(error).__name__})") from None


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(data):
            self._step(opcode.name, arg)
        if len(self.stack) != 1 or self.marks:
            raise PlainPickleError("damaged: it does not end with one value")
        return self.stack[0]

    def _step(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name in _NUMBERS or name in _TEXT:
            stack.append(arg)
        elif name in _PUT:
            self.memo[len(self.memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[arg])
        elif name in _BYTES:
            stack.append(_decode(arg))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._build("TUPLE", [stack.pop() for _ in range(_TUPLES[name])][::-1])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _FROM_MARK:
            mark = self.marks.pop()
            items = stack[mark:]
            del stack[mark:]
            self._build(name, items)
        elif name == "APPEND":
            self._build("APPENDS", [stack.pop()])
        elif name == "SETITEM":
            self._build("SETITEMS", [stack.pop(), stack.pop()][::-1])
        elif name not in _NOTHING and name != "STOP":
            named = (
                " ".join(map(str, stack[-2:])) if name == "STACK_GLOBAL" else arg if name in ("GLOBAL", "INST") else ""
            )
            what = f" ({' '.join(named.split())[:80]})" if named else ""
            mend = "; write its arrays with .tolist() and its numbers with int() or float()" if "numpy" in what else ""
            raise PlainPickleError(
                f"holds more than plain lists, dicts, text and numbers: opcode {name}{what}; nothing was executed{mend}"
            )

    def _build(self, name: str, items: list[Any]) -> None:
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name == "APPENDS":
            if type(stack[-1]) is not list:
                raise PlainPickleError("damaged: appends to something that is not a list")
            stack[-1].extend(items)
        else:
            if name == "DICT":
                stack.append({})
            keys = items[::2]
            # Only text is hashed: the hash of a nested tuple recurses in C without a limit.
            if type(stack[-1]) is not dict or len(items) % 2 or not all(type(key) is str for key in keys):
                raise PlainPickleError("a dict in it is damaged or has a key that is not text")
            stack[-1].update(zip(keys, items[1::2], strict=True))


def _decode(value: str | bytes) -> str:
    # pickletools hands over the strings of Python 2 decoded as Latin-1.
    raw = value if isinstance(value, bytes) else value.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
