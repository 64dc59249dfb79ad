"""The members of a tar archive that nobody vouches for: one after the other, forwards, in bounded time and memory."""

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from core.base.errors import UserError

_MOST_HEADER_BYTES = 2**18  # of one member: long names and other extensions before its own header
_MOST_GLOBAL_RECORDS = 100
# Kinds of headers whose content belongs to the next one.
_PAX, _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), (b"L", b"K")
# tarfile's regular expressions need time that grows with the square of such a run (CVE-2024-6232); no name is as long.
_DIGITS = re.compile(rb"\d{256}")


def members(file: io.BufferedIOBase) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member, and where the header behind it stands; `file` may be moved before the next one is asked for.

    tarfile reads the headers, but through `_Headers`, and a member must not lead backwards: left alone, a size below
    zero is read in circles for ever, a thousand extensions of one member exhaust the stack, and a long name takes the
    memory that it asks for.

    Raises `tarfile.TarError` for headers that are damaged, or made to look so. What lies behind the end mark is left
    to the caller, and so is an archive that ends without one.
    """
    headers, position = _Headers(file), 0
    try:
        fileobj = cast(BinaryIO, headers)  # as much of one as tarfile uses
        with tarfile.open(fileobj=fileobj, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or a million of them take gigabytes
                _check(member, position, tar)
                position = tar.offset
                yield member, position
                headers.expect_member()
    # The last three come from numbers in damaged headers and from extensions of extensions.
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(" ".join(str(error).split())) from error
    if any(headers.last):  # tarfile takes whatever is no header for the end, where there are zeros
        raise tarfile.ReadError(f"no header at byte {position}")


def _check(member: tarfile.TarInfo, position: int, tar: tarfile.TarFile) -> None:
    """Raises `UserError` unless the member lies behind `position`, and its content ends where the next one begins."""
    if member.size < 0 or not position < member.offset_data <= tar.offset:
        raise UserError(f"{member.name[:200]!a} has {member.size} bytes")
    if member.isreg() and not member.issparse() and tar.offset - member.offset_data != -(-member.size // 512) * 512:
        raise UserError(f"{member.name[:200]!a} has two sizes")
    if len(tar.pax_headers) > _MOST_GLOBAL_RECORDS:  # each member gets a copy of them
        raise UserError(f"more than {_MOST_GLOBAL_RECORDS} records for all members")


class _Headers:
    """What tarfile reads of an archive: the headers, not the members' content."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read
        self.last, self._extends, self._left = b"", b"", _MOST_HEADER_BYTES

    def expect_member(self) -> None:
        self._left = _MOST_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(f"a member with headers of more than {_MOST_HEADER_BYTES} bytes")
        self._left -= size
        self.last = data = self._read(size)
        if self._extends in _PAX:
            _check_records(data)
        kind = data[156:157] if size == tarfile.BLOCKSIZE and not self._extends else b""
        self._extends = kind if kind in _PAX + _LONG else b""
        return data


def _check_records(data: bytes) -> None:
    """Raises `tarfile.ReadError` unless pax records, `LENGTH KEY=VALUE\\n`, fill it up to the zeros at its end."""
    end, position = len(data.rstrip(b"\0")), 0
    while position < end:
        length, _, _ = data[position : position + 10].partition(b" ")
        record = data[position : position + int(length)] if length.isdigit() else b""
        if b"=" not in record or not record.endswith(b"\n") or len(record) != int(length):
            raise tarfile.ReadError("a damaged extended header")
        position += len(record)
    if _DIGITS.search(data):
        raise tarfile.ReadError("a number of 256 digits or more in an extended header")
