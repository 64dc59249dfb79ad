"""A reader for the pickles in weight files, with no way to run anything.

A pickle is a program. PyTorch's own reader executes only what it knows, but a file of a megabyte still ends the process
(a tuple nested a million times, hashed as a key, overflows the C stack), and one of a few hundred bytes asks for
terabytes. This one knows the opcodes and the few classes that `torch.save` writes for tensors and plain values. Any
other class becomes a `Foreign`, whatever is done with it: nothing is imported, nothing is called.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.errors import ModelError

MOST_OPCODES = 1_000_000  # a ResNet-152 with momentum and moving average has 130,000
MOST_VALUES = 4_000_000  # with what is shared counted each time
DEEPEST = 50
MOST_DIMENSIONS = 16
LARGEST_INT = 2**64

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# NumPy's kinds of numbers: a rate by `np.cos`, as pycls sets it, stands in the optimizer's state as one.
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | dict(
    zip(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), "bBhHiIqQ", strict=True)
)
# Plain values too, which no weight is read from: not read, and no reason to refuse the file.
LEFT_ASIDE = {"torch.device", "collections.Counter"}
LEFT_ASIDE |= {f"{module}.{name}" for module in ("__builtin__", "builtins") for name in ("set", "complex")}
LEFT_ASIDE |= {str(dtype) for dtype in DTYPES.values()}

_NOTHING = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_INTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
_FLOATS = {"FLOAT", "BINFLOAT"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_PYTHON_2_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_BYTES = {"BINBYTES", "SHORT_BINBYTES"}  # since protocol 3
_FROM_MARK = {"LIST", "DICT", "TUPLE", "APPENDS", "SETITEMS"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


class WeightPickleError(ModelError):
    """The bytes are damaged, or hold what no weight file does."""


class Foreign:
    """Stands for an object of a class that is not read, and for whatever is made with it."""

    def __init__(self, name: str) -> None:
        self.name = name


class _NumPyKind:
    """A dtype of NumPy."""

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "<"


class WeightPickle:
    """Reads one pickle. `storage(key, dtype, numel)` gives the 1-d tensor that tensors are views of.

    `foreign` names the first class that is not read, None where there is none.
    """

    def __init__(self, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self.storage = storage
        self.foreign: str | None = None
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, file: BinaryIO) -> Any:
        """The value; `file` then stands behind the pickle. Raises `WeightPickleError`.

        Memory and time grow with the bytes that are read, not with the numbers written in them.
        """
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
                if count > MOST_OPCODES:
                    raise WeightPickleError(f"more than {MOST_OPCODES:,} opcodes")
                self._step(opcode.name, arg)
        except WeightPickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as error:  # of pickletools, or of a poor stack
            raise WeightPickleError(f"damaged ({type(error).__name__})") from None
        if len(self._stack) != 1 or self._marks:
            raise WeightPickleError("damaged: it does not end with one value")
        _measure(self._stack[0])
        return self._stack[0]

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in _INTS:
            if not -LARGEST_INT < arg < LARGEST_INT:
                raise WeightPickleError("holds a number of more than 64 bits")
            stack.append(arg)
        elif name in _FLOATS or name in _BYTES:
            stack.append(arg)
        elif name in _TEXT:
            stack.append(_unicode(arg))
        elif name in _PYTHON_2_TEXT:
            stack.append(_unicode(arg.encode("latin-1").decode(errors="replace")))  # pickletools reads Latin-1
        elif name in _PUT:
            self._memo[len(self._memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[arg])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._build("TUPLE", [stack.pop() for _ in range(_TUPLES[name])][::-1])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in _FROM_MARK:
            mark = self._marks.pop()
            items = stack[mark:]
            del stack[mark:]
            self._build(name, items)
        elif name == "APPEND":
            self._build("APPENDS", [stack.pop()])
        elif name == "SETITEM":
            self._build("SETITEMS", [stack.pop(), stack.pop()][::-1])
        else:
            self._object(name, arg)

    def _build(self, name: str, items: list[Any]) -> None:
        stack = self._stack
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name == "DICT":
            stack.append(_update({}, items))
        elif type(stack[-1]) is Foreign:
            return
        elif name == "APPENDS":
            if type(stack[-1]) is not list:
                raise WeightPickleError("damaged: it appends to something that is not a list")
            stack[-1].extend(items)
        else:
            _update(stack[-1], items)

    def _object(self, name: str, arg: Any) -> None:
        """Opcodes about classes."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(self._class(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            qualified = [str(stack.pop()), str(stack.pop())]
            stack.append(self._class(".".join(reversed(qualified))))
        elif name in ("REDUCE", "NEWOBJ"):
            args, of = stack.pop(), stack.pop()
            stack.append(self._called(of, args) if name == "REDUCE" else self._unread(_name(of)))
        elif name == "BUILD":  # attributes of an OrderedDict (the versions of its modules), or of a Foreign
            state = stack.pop()
            if type(stack[-1]) is _NumPyKind:
                stack[-1].order = "<" if state[1] in ("<", "|") else ">"
            elif type(stack[-1]) not in (dict, Foreign):
                raise WeightPickleError("damaged: it sets attributes of a plain value")
        elif name == "BINPERSID":
            stack.append(self._stored(stack.pop()))
        elif name in ("EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8"):
            raise WeightPickleError(f"holds more than tensors and plain values (opcode {name})")
        elif name not in _NOTHING and name != "STOP":
            raise WeightPickleError(f"holds an opcode that no weight file has ({name})")

    def _class(self, name: str) -> Any:
        if name in _CALLS:
            return _CALLS[name]
        if name in LEFT_ASIDE:
            return Foreign(name)
        return DTYPES.get(name.removeprefix("torch.")) or self._unread(name)

    def _unread(self, name: str) -> Foreign:
        name = name[:100] if name.isprintable() else ascii(name)[:100]
        self.foreign = self.foreign or name
        return Foreign(name)

    def _called(self, of: Any, args: Any) -> Any:
        if type(of) is Foreign:
            return Foreign(of.name)
        if of not in _CALLS.values() or type(args) is not tuple:
            raise WeightPickleError("damaged: it calls a plain value")
        if any(type(arg) is Foreign for arg in args[:1]):
            return Foreign(args[0].name)
        if of is _number and type(args[0]) is _NumPyKind and (args[0].name not in NUMBERS or args[0].order == ">"):
            return self._unread(f"numpy.{args[0].order}{args[0].name}")
        return of(*args)

    def _stored(self, place: Any) -> Any:
        """A tensor's data: ("storage", class, key, device, number of elements)."""
        if type(place) is not tuple or len(place) not in (5, 6) or place[5:] not in ((), (None,)):
            raise WeightPickleError("damaged: it refers to something that is no tensor's data")
        what, dtype, key, _, numel = place[:5]
        if type(dtype) is Foreign:
            return Foreign(dtype.name)
        known = type(dtype) is torch.dtype and type(what) is type(key) is str and type(numel) is int
        if not known or what != "storage" or numel < 0:
            raise WeightPickleError("damaged: a tensor's data are described wrongly")
        return self.storage(key, dtype, numel)


def _unicode(text: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise WeightPickleError("holds text that is no Unicode")
    return text


def _update(target: Any, items: list[Any]) -> dict:
    # The hash of a nested tuple recurses in C without a limit, and whole numbers of many bits can be made to collide.
    if type(target) is not dict or len(items) % 2 or not all(_is_key(key) for key in items[::2]):
        raise WeightPickleError("a dict in it is damaged, or has a key that is neither text nor a whole number")
    target.update(zip(items[::2], items[1::2], strict=True))
    return target


def _is_key(key: Any) -> bool:
    return type(key) in (str, bool, type(None), Foreign) or (type(key) is int and abs(key) < 2**60)


def _measure(value: Any) -> None:
    """Refuse what no loop over the value would come to the end of: it may hold itself, or one list a million times."""
    left = MOST_VALUES
    pending = [(value, 1)] if type(value) in (dict, list, tuple) else []
    while pending:
        inner, depth = pending.pop()
        children = inner.values() if type(inner) is dict else inner
        left -= len(children)
        if depth > DEEPEST or left < 0:
            raise WeightPickleError(f"nested more than {DEEPEST} deep, or more than {MOST_VALUES:,} values")
        pending += [(child, depth + 1) for child in children if type(child) in (dict, list, tuple)]


def _name(of: Any) -> str:
    return of.name if type(of) is Foreign else str(getattr(of, "__name__", of))


# ------------------------------------------------------------------------------- what stands for torch's own functions


def _tensor(
    storage: Tensor,
    offset: int,
    size: tuple,
    stride: tuple,
    _grad: object = None,
    _hooks: object = None,
    bits: Any = None,
) -> Tensor:
    if bits:  # its data are to be negated, say
        raise WeightPickleError("holds a tensor whose values are not what is stored: save its .resolve_neg()")
    if type(storage) is not Tensor or type(size) is not tuple or type(stride) is not tuple:
        raise WeightPickleError("damaged: a tensor is described wrongly")
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n for n in whole):
        raise WeightPickleError("damaged: a tensor has a size that cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) >= 2**62 or max(whole) >= 2**62 or (0 not in size and last >= len(storage)):
        raise WeightPickleError("damaged: a tensor has more elements than its data")
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Tensor, *_rest: object) -> Tensor:
    return data


def _ordered_dict(pairs: Any = ()) -> dict:
    """Python 2 hands its items over as a list of [key, value]."""
    return _update({}, [part for pair in pairs for part in pair])


def _size(sizes: tuple) -> tuple:
    return tuple(sizes)


def _kind(name: str, *_rest: object) -> _NumPyKind:
    if type(name) is not str or not name.isalnum() or len(name) > 8:
        raise WeightPickleError("damaged: a kind of NumPy's numbers is described wrongly")
    return _NumPyKind(name)


def _number(kind: _NumPyKind, data: bytes) -> float | int | bool:
    code = "<" + NUMBERS[kind.name]
    if type(data) is not bytes or len(data) != struct.calcsize(code):
        raise WeightPickleError("damaged: a number of NumPy's has another size")
    return struct.unpack(code, data)[0]


def _bytes(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise WeightPickleError("damaged: bytes are written wrongly")
    return text.encode("latin-1")


_CALLS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _bytes,
    "numpy.dtype": _kind,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
