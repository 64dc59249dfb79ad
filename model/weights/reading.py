"""Weight files written by `torch.save`, read whole and verified: what they hold as plain values and tensors.

Since PyTorch 1.6 they are zip archives (a pickle, and a part for each tensor's data) with a checksum of every part,
which `torch.load` does not look at: here all are held against it, unless the writer had switched them off. Before 1.6
they were pickles with the data behind them, without checksums.
"""

import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.errors import ModelError
from model.weights.pickles import WeightPickle, WeightPickleError

BLOCK = 1 << 22
MOST_PICKLED = 64 << 20  # bytes; a ResNet-152 with momentum and moving average has under a megabyte
# The pickle's protocol, the length that newer ones put before it, and a number that marks a file of torch.save.
LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?" + re.escape(bytes.fromhex("8a0a6cfc9c46f9206aa850192e")), re.DOTALL)
LONGEST_LINE = 1 << 16

# How files begin that are taken for weights, and what to do about it.
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"BZh", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ", "compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"\x89HDF", "an HDF5 file (Keras?), not one of torch.save"),
    (b"\x93NUMPY", "a NumPy array, not a file of torch.save"),
    (b"GGUF", "a GGUF file, not one of torch.save"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
)
SAFETENSORS = "a safetensors file: convert it, torch.save(safetensors.torch.load_file(FILE), NEW)"


class WeightsError(ModelError):
    """A weight file that cannot be used; the message is one line."""


def read_weight_file(path: str | os.PathLike) -> Any:
    """The content of a file of `torch.save`, executing nothing in it. Tensors are on the CPU.

    Raises `WeightsError` for a damaged file, another kind of file, and one that holds more than tensors and values.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    try:
        with open(path, "rb") as file:
            kind = _kind(file)
            if kind == "zip":
                content, foreign = _read_archive(file)
            elif kind == "legacy":
                content, foreign = _read_legacy(file)
            else:
                raise WeightsError(f"{path}: not a weight file: it is {kind}")
    except WeightPickleError as error:
        raise WeightsError(f"{path}: not a weight file, or a damaged one: {error}") from None
    except zipfile.BadZipFile as error:
        fault = f"its archive is damaged or cut short ({_shown(error)})"
        raise WeightsError(f"{path}: not a readable weight file: {fault}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from None
    except WeightsError:
        raise
    except Exception as error:  # a damaged archive makes zipfile raise anything
        raise WeightsError(f"{path}: not a readable weight file: {type(error).__name__}: {_shown(error)}") from None
    if foreign:
        raise WeightsError(f"{path}: {_describe_foreign(content, foreign)}")
    return content


def _describe_foreign(content: Any, foreign: str) -> str:
    what = "not a weight file, or one that holds more than tensors and plain values"
    lightning = isinstance(content, dict) and "pytorch-lightning_version" in content
    return f"{what} ({foreign}): " + ("a checkpoint of Lightning" if lightning else "save its state dict alone")


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return text if text.isprintable() else ascii(text)


def _kind(file: BinaryIO) -> str:
    """`zip`, `legacy`, or what the file is instead."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(1024)
    file.seek(0)
    if not head:
        return "empty"
    for beginning, what in BEGINNINGS:
        if head.startswith(beginning):
            return what
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
        return "a web page (HTML): the address led to a page, perhaps of a login or an error; download it again"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head.startswith(b"PK"):
        return "zip"
    if LEGACY.match(head):
        return "legacy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return SAFETENSORS
    if head[:1] == b"\x80":
        return "a pickle, but not one of torch.save"
    if not head.strip(b"\0"):
        return "empty: it begins with nothing but zeros, a download that was broken off?"
    if head[:1] in b"{[":
        return "JSON text"
    return "of a kind that is not known here"


class _Room:
    """Memory for the data that a pickle names: no more than there are bytes in the file."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.storages: dict[str, Tensor] = {}

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        known = self.storages.get(key)
        if known is None:
            self.left -= numel * dtype.itemsize
            if self.left < 0:
                raise WeightPickleError("cut short or damaged: its tensors have more data than the file")
            known = self.storages[key] = torch.empty(numel, dtype=dtype)
        if known.dtype != dtype or len(known) != numel:
            raise WeightPickleError("damaged: it describes the same data in two ways")
        return known


def _fill(storage: Tensor, file: Any) -> None:
    """Read all of a storage's bytes; `file` has `readinto`."""
    target = storage.view(torch.uint8).numpy().data if len(storage) else memoryview(b"")
    while target:
        got = file.readinto(target[:BLOCK])
        if not got:
            raise WeightPickleError("cut short: a tensor's data end too early")
        target = target[got:]


# --------------------------------------------------------------------------------------------------- zip, since 1.6


def _read_archive(file: BinaryIO) -> tuple[Any, str | None]:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        parts = {entry.filename.partition("/")[2]: entry for entry in entries}
        _check_entries(entries, parts, size)
        if not any(entry.CRC for entry in entries):  # switched off when it was written: set_crc32_options
            for entry in entries:
                entry.CRC = None  # type: ignore[assignment]  # zipfile then checks none
        room = _Room(size)
        pickle = WeightPickle(room.storage)
        content = pickle.read(io.BytesIO(archive.read(parts["data.pkl"])))
        if parts.get("byteorder") and archive.read(parts["byteorder"]) != b"little":
            raise WeightPickleError("written on a big-endian machine, which is not read here")
        for name, storage in room.storages.items():
            data = parts.get(f"data/{name}")
            if data is None or data.file_size != len(storage) * storage.dtype.itemsize:
                raise WeightPickleError(f"damaged: the data of tensor {name[:40]!r} are absent or of another size")
        for name, entry in parts.items():
            with archive.open(entry) as part:  # which holds what it reads against the checksum
                if name.startswith("data/") and name[len("data/") :] in room.storages:
                    _fill(room.storages[name[len("data/") :]], part)
                while part.read(BLOCK):
                    pass
    return content, pickle.foreign


def _check_entries(entries: list[zipfile.ZipInfo], parts: dict[str, zipfile.ZipInfo], size: int) -> None:
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if "constants.pkl" in parts or any(name.startswith("code/") for name in parts):
        raise WeightPickleError("a TorchScript archive, which is a program: save its state_dict() by torch.save")
    if any(entry.filename.endswith(".npy") for entry in entries):
        raise WeightPickleError("NumPy arrays (npz), not a file of torch.save")
    if "data.pkl" not in parts:
        raise WeightPickleError("a zip archive that torch.save did not write: unpack it, the weights may lie inside")
    if len(roots) != 1 or len(parts) != len(entries):
        raise WeightPickleError("damaged: its archive holds more than one file of torch.save, or names a part twice")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise WeightPickleError("its archive is compressed or encrypted, as torch.save writes none: save it again")
    if sum(entry.file_size for entry in entries) > size or parts["data.pkl"].file_size > MOST_PICKLED:
        raise WeightPickleError("damaged: the parts of its archive are larger than the file, or its pickle is huge")


# -------------------------------------------------------------------------------------------------- pickles, to 1.5


class _Pickles:
    """The first `MOST_PICKLED` bytes of a file. It allocates no more than it reads, whatever length it is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = MOST_PICKLED

    def read(self, length: int) -> bytes:
        return self._counted(self.file.read(min(length, self.left)) if length > 1 else self.file.read(length))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(LONGEST_LINE))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise WeightPickleError("its pickle is huge")
        return data


def _read_legacy(file: BinaryIO) -> tuple[Any, str | None]:
    size = os.fstat(file.fileno()).st_size
    room = _Room(size)
    pickled: Any = _Pickles(file)  # as much of a file as pickletools uses

    def read(pickle: WeightPickle) -> Any:
        return pickle.read(pickled)

    plain = _Room(0).storage
    beginning = LEGACY.match(file.read(64))
    assert beginning is not None, "another kind of file"
    file.seek(beginning.end())
    _, system = read(WeightPickle(plain)), read(WeightPickle(plain))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightPickleError("damaged, or written on a big-endian machine")
    pickle = WeightPickle(room.storage)
    content = read(pickle)
    if pickle.foreign:  # whose data are among the others'
        return content, pickle.foreign
    keys = read(WeightPickle(plain))
    if type(keys) is not list or not all(type(key) is str for key in keys) or {*keys} != {*room.storages}:
        raise WeightPickleError("damaged: the list of its tensors does not fit them")
    for key in keys:
        if int.from_bytes(file.read(8), "little") != len(room.storages[key]):
            raise WeightPickleError(f"cut short or damaged: the data of tensor {key[:40]!r} have another size")
        _fill(room.storages[key], file)
    if file.read(1):
        raise WeightPickleError("damaged: it goes on behind its tensors")
    return content, pickle.foreign
