"""Archives that were made to cost: each ends in one line, in bounded time and memory; odd but whole ones are read."""

import gzip
import io
import re
import subprocess
import tarfile
import time
import tracemalloc

import pytest

from datasets.images.decode import ImageError
from evaler.sources.images import named_images
from evaler.sources.tar_members import members
from evaler.sources.unpack import ArchiveError, Wanted, unpack

END = bytes(1024)


def header(name: bytes = b"a.txt", size: bytes | int = 0, kind: bytes = b"0") -> bytes:
    """A ustar header with a fitting checksum; a number below zero is written as GNU tar writes it."""
    if isinstance(size, int):
        size = b"%011o\0" % size if size >= 0 else (2**96 + size).to_bytes(12, "big")
    fields = name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0"
    rest = kind + bytes(100) + b"ustar\x0000" + bytes(247)
    return fields + b"%06o\0 " % sum(fields + b" " * 8 + rest) + rest


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def extension(kind: bytes, content: bytes) -> bytes:
    return header(b"extension", len(content), kind) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    return str(length + (len(str(length)) + len(rest) > length)).encode() + rest


GOOD = header(b"a.jpg", 3) + padded(b"one")
NESTED = b"".join(b"%d " % 2 for _ in range(30_000))
HOSTILE = {
    "a size below zero": GOOD + header(b"b.txt", -512) + END,
    "a size below zero that leads to the first header": GOOD + header(b"b.jpg", -1536) + END,
    "a folder of a size below zero": GOOD + header(b"b", -1024, b"5") + END,
    "a size below zero by record": GOOD + extension(b"x", record(b"size", b"-512")) + header(b"b.txt") + END,
    "a long name of a size below zero": GOOD + header(b"b", -512, b"L") + END,
    "a long name of 8 GB": GOOD + header(b"b", 2**33 - 1, b"L") + END,
    "chained long names": GOOD + extension(b"L", b"b.jpg\0") * 600 + header() + END,
    "chained short records": GOOD + extension(b"x", record(b"comment", b"b")) * 600 + header() + END,
    "chained empty extensions": GOOD + header(b"b", 0, b"L") * 2000 + header() + END,
    "long digits": GOOD + extension(b"x", record(b"comment", b"1" * 200_000)) + header() + END,
    "no records": GOOD + extension(b"x", b"1" * 200_000) + header() + END,
    "records inside records": GOOD + extension(b"x", NESTED + b"k=v\n") + header() + END,
    "records for all": GOOD
    + b"".join(extension(b"g", record(b"%d" % i, b"v")) + header(b"%d" % i) for i in range(101))
    + END,
    "a size for all": GOOD + extension(b"g", record(b"size", b"3")) + header(b"b.jpg", 600) + bytes(1024) + END,
    "a map of holes that has no end": GOOD
    + extension(b"x", record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"))
    + header(b"b.txt", 512)
    + (b"9" * 15 + b"\n").ljust(512, b"0")
    + END,
    "a name that is no text": GOOD + extension(b"x", record(b"hdrcharset", b"\xff")) + header() + END,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_bounds_when_indexed_and_when_unpacked(tmp_path, name):
    (tmp_path / "x.tar").write_bytes(HOSTILE[name])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(HOSTILE[name], 1))
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(ImageError, match=rf"^{tmp_path}/x\.tar: a truncated or damaged archive \(.*\); get it again$"):
        named_images(tmp_path / "x.tar")
    with pytest.raises(ArchiveError, match=rf"^{tmp_path}/x\.tar\.gz: a damaged archive, or one cut short \("):
        unpack(tmp_path / "x.tar.gz", tmp_path / "jpg", Wanted(["a.jpg"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list((tmp_path / "jpg").iterdir()) == []
    assert time.process_time() - start < 5 and peak < 2**25


def test_archives_of_the_shared_cases_end_in_one_line(shared):
    for name in ("b256neg.tar", "longchain.tar"):
        with pytest.raises(ImageError, match=re.escape(f"{name}: a truncated or damaged archive (")):
            named_images(shared / "cases" / name)


def test_what_expands_a_hundred_times_is_refused_before_it_is_unpacked(tmp_path):
    bomb = header(b"a.jpg", 2**25) + bytes(2**25)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bomb + END, 1))
    with pytest.raises(ArchiveError, match=r"x\.tar\.gz: holds more than the \d{8} bytes that are allowed"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "jpg", Wanted(["a.jpg"]))


def test_long_names_with_letters_of_header_kinds_are_names(tmp_path):
    """Where a header tells its kind the name's content has these letters."""
    names = [(kind * 250 + b".jpg").decode() for kind in (b"x", b"g", b"X", b"L", b"K", b"1")]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        assert named_images(tmp_path / "x.tar")[0].names == names


def test_attributes_and_holes_of_the_tar_command_are_passed_over(tmp_path):
    """As GNU tar packs them: a table of holes in each of its forms, links of either kind, a device, records for all."""
    with open(tmp_path / "holes.bin", "wb") as file:
        for block in range(200):
            file.seek(block * 2**16)
            file.write(b"x" * 4096)
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "c.jpg").hardlink_to(tmp_path / "a.jpg")
    for form in (["gnu"], *(["posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))):
        command = ["tar", "-cSf", "x.tar", f"--format={form[0]}", *form[1:], "holes.bin", "a.jpg", "b.jpg", "c.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        with open(tmp_path / "x.tar", "rb") as file:
            found = list(members(file))
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert [member.name for member, _ in found] == tar.getnames() == ["holes.bin", "a.jpg", "b.jpg", "c.jpg"]
            assert [member.offset_data for member, _ in found] == [member.offset_data for member in tar]
        images, notes = named_images(tmp_path / "x.tar")
        assert [images.read(i) for i in range(len(images))] == [b"one"]
        assert notes[0].startswith("2 images in ") and len(notes) == 2
