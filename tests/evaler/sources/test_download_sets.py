import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from core.base.download import DownloadError
from core.base.errors import ending
from core.base.locks import folder_lock
from evaler.sources import download_sets
from evaler.sources.download_sets import RetrievalSet, distractors, fetch_all, fetch_set, known_sets, read_names
from evaler.sources.unpack import ArchiveError, Unpacked, Wanted, unpack

ROOT = Path(__file__).resolve().parents[3]
ARCHIVE = "/jpg/revisitop1m.{}.tar.gz"


def photo(name: str, size: int = 2000) -> bytes:
    """Stands in for the image of that name: does not compress, as a JPEG does not."""
    return random.Random(name).randbytes(size)


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(*members: str | tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """Of names (each with its photo), (name, content) and headers without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for entry in members:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                name, content = (entry, photo(entry)) if isinstance(entry, str) else entry
                archive.addfile(member(name, size=len(content)), io.BytesIO(content))
    return buffer.getvalue()


def tar_gz(*members) -> bytes:
    return gzip.compress(tar(*members), 1)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = [f"{number % 3:03x}/{number:06x}.jpg" for number in range(12)]


@pytest.fixture
def million(file_server) -> RetrievalSet:
    """Three archives with four of the twelve images each."""
    file_server.files["/revisitop1m.txt"] = "\n".join([*NAMES, ""]).encode()
    for number in range(3):
        file_server.files[ARCHIVE.format(number + 1)] = tar_gz(*NAMES[4 * number : 4 * number + 4])
    return distractors(file_server.url, archives=3, images=12)


@pytest.fixture
def asked(file_server):
    """How often each archive was asked for."""
    return lambda: [sum(path == ARCHIVE.format(number) for path, _ in file_server.asked) for number in (1, 2, 3)]


# ------------------------------------------------------------------------------------------------------------- fetching


def test_a_set_arrives_where_the_list_puts_it_and_is_not_fetched_again(million, file_server, asked, tmp_path, capsys):
    fetch_all([million], tmp_path)
    assert "revisitop1m: found 12 of 12 images of revisitop1m.txt\n" in capsys.readouterr().out
    folder = tmp_path / "revisitop1m"
    assert tree(folder / "jpg") == {name: photo(name) for name in NAMES}
    assert {path.name for path in folder.iterdir()} == {"jpg", "revisitop1m.txt", "unpacked.json"}
    assert list(json.loads((folder / "unpacked.json").read_text())) == [ARCHIVE.format(i)[5:] for i in (1, 2, 3)]
    assert fetch_set(million, tmp_path) == []
    assert asked() == [1, 1, 1] and len(file_server.asked) == 4
    (folder / "unpacked.json").unlink()  # and the images alone suffice
    assert fetch_set(million, tmp_path) == []
    assert asked() == [1, 1, 1]


def test_archives_are_kept_if_asked_and_used_if_there(million, file_server, asked, tmp_path):
    folder = tmp_path / "revisitop1m"
    folder.mkdir()
    (folder / "revisitop1m.2.tar.gz").write_bytes(file_server.files[ARCHIVE.format(2)])
    assert fetch_set(million, tmp_path, keep_archives=True) == []
    assert asked() == [1, 0, 1]
    for number in (1, 2, 3):
        assert (folder / ARCHIVE.format(number)[5:]).read_bytes() == file_server.files[ARCHIVE.format(number)]
    fetch_set(million, tmp_path)
    assert list(folder.glob("*.tar.gz*")) == []


def test_a_broken_download_goes_on_within_its_archive(million, file_server, tmp_path):
    file_server.files[ARCHIVE.format(2)] = tar_gz(*((name, photo(name, 50_000)) for name in NAMES[4:8]))
    file_server.break_after = 100_000
    with pytest.raises(DownloadError, match=r"revisitop1m.2.tar.gz: the connection ended after 100000 of"):
        fetch_set(million, tmp_path)
    file_server.break_after = None
    file_server.asked.clear()
    assert fetch_set(million, tmp_path) == []
    assert file_server.asked == [(ARCHIVE.format(2), "bytes=100000-"), (ARCHIVE.format(3), None)]


def test_missing_images_are_counted_and_named(million, file_server, tmp_path, capsys):
    file_server.files[ARCHIVE.format(2)] = tar_gz(*NAMES[5:7])
    with pytest.raises(ValueError, match=f"^revisitop1m: 2 of 12 images are missing, the first is {NAMES[4]}; delete"):
        fetch_all([million], tmp_path)
    assert "found 10 of 12 images of revisitop1m.txt" in capsys.readouterr().out
    (tmp_path / "revisitop1m/jpg" / NAMES[0]).unlink()
    assert fetch_set(million, tmp_path) == [NAMES[0], NAMES[4], NAMES[7]]


def test_sets_behind_an_incomplete_one_are_fetched_too(million, file_server, tmp_path):
    file_server.files |= {"/x/list.txt": b"a.jpg\nb.jpg\n", "/x/a.tgz": tar_gz("a.jpg")}
    other = RetrievalSet("other", f"{file_server.url}/x/list.txt", (f"{file_server.url}/x/a.tgz",), images=2)
    with pytest.raises(ValueError, match=r"^other: 1 of 2 images are missing, the first is b.jpg; delete [^;\n]*$"):
        fetch_all([other, million], tmp_path)
    assert len(tree(tmp_path / "revisitop1m/jpg")) == 12


def test_a_ground_truth_names_the_images_and_folders_of_archives_are_flattened(file_server, tmp_path):
    gnd = [{"bbx": [0, 0, 9, 9], "easy": [0], "hard": [], "junk": []}]
    content = pickle.dumps({"imlist": ["b_1", "b_2"], "qimlist": ["a_1"], "gnd": gnd}, protocol=2)
    file_server.files |= {
        "/gnd_small.pkl": content,
        "/one.tgz": tar_gz(member("paris", type=tarfile.DIRTYPE), ("paris/a/a_1.jpg", b"A"), ("paris/a/no.jpg", b"N")),
        "/two.tgz": tar_gz(("paris/b/b_1.jpg", b"B"), ("paris/b/b_2.jpg", b"C"), ("paris/readme.txt", b"R")),
    }
    urls = (f"{file_server.url}/one.tgz", f"{file_server.url}/two.tgz")
    digest = hashlib.sha256(content).hexdigest()
    small = RetrievalSet("small", f"{file_server.url}/gnd_small.pkl", urls, images=3, sha256=digest)
    assert fetch_set(small, tmp_path) == []
    assert tree(tmp_path / "small/jpg") == {"a_1.jpg": b"A", "b_1.jpg": b"B", "b_2.jpg": b"C"}

    wrong = RetrievalSet("wrong", f"{file_server.url}/gnd_small.pkl", urls, images=3, sha256="0" * 64)
    with pytest.raises(DownloadError, match=f"gnd_small.pkl: the sha256 is {digest}, not 000"):
        fetch_set(wrong, tmp_path)
    assert tree(tmp_path / "wrong") == {}


def test_another_number_of_images_than_the_set_has_stops_before_any_archive(million, file_server, asked, tmp_path):
    file_server.files["/revisitop1m.txt"] = "\n".join(NAMES[:-1]).encode()
    with pytest.raises(ValueError, match=r"revisitop1m.txt: names 11 images, revisitop1m has 12; delete it"):
        fetch_set(million, tmp_path)
    assert asked() == [0, 0, 0]


@pytest.mark.parametrize(
    "name",
    ["../x.jpg", "/x.jpg", "a//x.jpg", "./x.jpg", "a/../../x.jpg", "x.txt", "", "x\0y.jpg", "\udcff.jpg", "a\t.jpg"],
)
def test_a_list_cannot_name_what_is_no_image_below_its_folder(tmp_path, name):
    path = tmp_path / "list.txt"
    path.write_bytes(f"good.jpg\n{name}\nb.jpg\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"list.txt, line 2: .* cannot be the path of an image") as raised:
        read_names(path)
    assert str(raised.value).isprintable()


def test_lists_are_read_with_any_line_end_and_without_doubles(tmp_path):
    path = tmp_path / "list.txt"
    for content in ("a/x.jpg\nb/x.JPG\n", "a/x.jpg\r\nb/x.JPG\r\n", "a/x.jpg\nb/x.JPG"):
        path.write_bytes(content.encode())
        assert read_names(path) == ["a/x.jpg", "b/x.JPG"]
    path.write_text("a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(ValueError, match=r"list.txt: names some images twice"):
        read_names(path)


def test_two_processes_do_not_work_on_a_set_at_once(million, tmp_path):
    with folder_lock(tmp_path / "revisitop1m"), pytest.raises(ValueError, match="revisitop1m is being downloaded by"):
        fetch_set(million, tmp_path)
    assert fetch_set(million, tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_a_damaged_state_file_is_named(million, tmp_path, content):
    (tmp_path / "revisitop1m").mkdir()
    (tmp_path / "revisitop1m/unpacked.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"unpacked.json: not a list of unpacked archives; delete it"):
        fetch_set(million, tmp_path)


def test_the_published_addresses_and_mirrors():
    documented = (ROOT / "datasets/DATA.md").read_text()
    sets = known_sets({})
    for entry in (sets["roxford5k"], sets["rparis6k"]):
        assert entry.sha256 in documented and entry.archive_urls[0] in documented
        assert entry.list_url == f"http://cmp.felk.cvut.cz/revisitop/data/datasets/{entry.name}/gnd_{entry.name}.pkl"
    million = sets["revisitop1m"]
    assert million.images == 1_001_001 and len(million.archive_urls) == len(set(million.archive_urls)) == 100
    for url in (million.list_url, million.archive_urls[0]):
        assert url in documented
    assert million.archive_urls[-1].endswith("/jpg/revisitop1m.100.tar.gz")
    mirrors = {name: f"http://{name.lower()}/x/" for name in download_sets.BASE_URLS}
    for entry in known_sets(mirrors).values():
        for url in (entry.list_url, *entry.archive_urls):
            assert url.split("_base_url/x/")[0] in {f"http://{name[:-9].lower()}" for name in mirrors}


# ------------------------------------------------------------------------------------------------------- real processes

PROCESS = """
import os, sys
from pathlib import Path
from core.base.errors import entry_point
from evaler.sources.download_sets import distractors, fetch_all

calls = 0
def dying(function):
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os._exit(9)
        return function(*args, **kwargs)
    return counted
for name in ("fsync", "sync", "replace"):
    setattr(os, name, dying(getattr(os, name)))

@entry_point
def main():
    fetch_all([distractors(sys.argv[1], archives=3, images=12)], Path(sys.argv[2]))
main()
"""


def start(url: str, data_dir: Path, *, die_at: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, url, str(data_dir), str(die_at)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_kills_at_any_write_lose_at_most_one_archive(million, file_server, asked, tmp_path):
    folder = tmp_path / "revisitop1m"
    done: list[str] = []
    for die_at in (8, 9, 20, 8, 7):
        asked_before, done_before = asked(), done
        code, _, err = finish(start(file_server.url, tmp_path, die_at=die_at))
        assert code == 9, err
        assert {name for name in tree(folder / "jpg") if not name.startswith(".unpacking/")} <= set(NAMES)
        assert all(content == photo(name) for name, content in tree(folder / "jpg").items() if name in NAMES)
        with contextlib.suppress(FileNotFoundError):
            done = list(json.loads((folder / "unpacked.json").read_text()))
        for number in (1, 2, 3):
            if ARCHIVE.format(number)[5:] in done_before:
                assert asked()[number - 1] == asked_before[number - 1]
        assert sum(asked()) - sum(asked_before) <= len(done) - len(done_before) + 1
    assert 0 < len(done) < 3
    code, _, err = finish(start(file_server.url, tmp_path))
    assert code == 0, err
    assert tree(folder / "jpg") == {name: photo(name) for name in NAMES}
    # A download killed between its last two steps leaves its memo.
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".part.json")}
    assert left == {"jpg", "revisitop1m.txt", "unpacked.json"}


def test_a_kill_and_ctrl_c_between_archives(million, file_server, asked, tmp_path):
    file_server.files[ARCHIVE.format(2)] = tar_gz(*((name, photo(name, 900_000)) for name in NAMES[4:8]))
    file_server.pause = 0.015
    folder = tmp_path / "revisitop1m"

    def until_part(process, size):
        part = folder / "revisitop1m.2.tar.gz.part"
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > size):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.005)

    process = start(file_server.url, tmp_path)
    until_part(process, 0)
    process.kill()
    process.communicate()
    assert list(json.loads((folder / "unpacked.json").read_text())) == ["revisitop1m.1.tar.gz"]
    size = (folder / "revisitop1m.2.tar.gz.part").stat().st_size
    process = start(file_server.url, tmp_path)
    until_part(process, size)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err
    file_server.pause = 0.0
    code, out, err = finish(start(file_server.url, tmp_path))
    assert code == 0, err
    assert "revisitop1m, archive 2 of 3: revisitop1m.2.tar.gz: 4 images, 0 of them were there already" in out
    assert asked() == [1, 3, 1]
    assert all(asked_range for path, asked_range in file_server.asked[3:] if path == ARCHIVE.format(2))
    assert len(tree(folder / "jpg")) == 12


def test_a_damaged_archive_is_one_line_and_code_2(million, file_server, tmp_path):
    whole = file_server.files[ARCHIVE.format(2)]
    file_server.files[ARCHIVE.format(2)] = whole[: len(whole) // 2]
    code, _, err = finish(start(file_server.url, tmp_path))
    archive = tmp_path / "revisitop1m/revisitop1m.2.tar.gz"
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {archive}: a damaged archive, or one cut short (")
    assert err.endswith("); delete it and run again to download it anew\n") and "Traceback" not in err
    assert len(tree(tmp_path / "revisitop1m/jpg")) == 4
    file_server.files[ARCHIVE.format(2)] = whole
    archive.unlink()
    assert fetch_set(million, tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ unpacking


@pytest.fixture
def unpacked(tmp_path):
    """Unpack members into a folder; return the result and what is there then."""

    def run(*members, content: bytes | None = None, names=("good.jpg", "a/evil.jpg"), **limits):
        archive = tmp_path / "x.tar.gz"
        archive.write_bytes(tar_gz(*members) if content is None else content)
        result = unpack(archive, tmp_path / "out/jpg", Wanted(list(names)), **limits)
        return result, tree(tmp_path / "out")

    return run


def test_members_are_found_by_path_then_by_their_last_part():
    wanted = Wanted(["a/1.jpg", "b/1.jpg", "c/2.jpg", "3.jpg"])
    assert wanted.find("a/1.jpg") == wanted.find("./a/1.jpg") == "a/1.jpg"
    assert wanted.find("1.jpg") is wanted.find("z/1.jpg") is None
    assert wanted.find("2.jpg") == wanted.find("z/y/2.jpg") == "c/2.jpg"
    assert wanted.find("z/3.jpg") == "3.jpg"
    assert wanted.find("4.jpg") is None


LINK = {"linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (("../evil.jpg", b"x"), "leads out of the folder"),
        (("a/../../../evil.jpg", b"x"), "leads out of the folder"),
        (("/tmp/evil.jpg", b"x"), "is an absolute path"),
        (("//evil.jpg", b"x"), "is an absolute path"),
        (member("a/evil.jpg", type=tarfile.SYMTYPE, **LINK), "is no regular file"),
        (member("a/evil.jpg", type=tarfile.LNKTYPE, **LINK), "is no regular file"),
        (member("a/evil.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"), "is no regular file"),
        (member("a/evil.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is no regular file"),
        (member("a/evil.jpg", type=tarfile.BLKTYPE, devmajor=8), "is no regular file"),
        (member("a/evil.jpg", type=tarfile.FIFOTYPE), "is no regular file"),
        (member("a/evil.jpg"), "is empty"),
        (("a/evil.sh", b"x"), "is no image by its extension"),
        (("a/evil.jpg/x.sh", b"x"), "is no image by its extension"),
        (("a/unknown.jpg", b"x"), "is not in the list"),
        (("a/\udcff.jpg", b"x"), "is not in the list"),
        (("good.jpg", b"another"), "comes again"),
        (("elsewhere/good.jpg", b"another"), "comes again"),
    ],
)
def test_hostile_members_are_passed_over(unpacked, tmp_path, hostile, why):
    before = set(tmp_path.parent.iterdir())
    result, written = unpacked("good.jpg", hostile)
    name = hostile.name if isinstance(hostile, tarfile.TarInfo) else hostile[0]
    assert result == Unpacked(images=1, kept=0, passed_over=1, first=f"{name!a} {why}")
    assert written == {"jpg/good.jpg": photo("good.jpg")}
    assert [path.name for path in (tmp_path / "out/jpg").iterdir()] == ["good.jpg"]
    assert set(tmp_path.parent.iterdir()) == before


def test_nothing_is_written_through_a_link_of_the_archive(unpacked, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    result, written = unpacked(member("a", type=tarfile.SYMTYPE, linkname=str(outside)), ("a/evil.jpg", b"x"))
    assert written == {"jpg/a/evil.jpg": b"x"} and list(outside.iterdir()) == []
    assert result.passed_over == 1


def raw_header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    block = bytearray(member(name, type=kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (tar(("good.jpg", b"x" * 3000)), r"'good.jpg' has 3000 bytes, at most 2500 are allowed"),
        (tar(("unwanted.bin", b"x" * 3000)), r"'unwanted.bin' has 3000 bytes"),
        (tar("good.jpg")[:2560] + raw_header("a/evil.jpg", b"7" * 11 + b"\0"), r"'a/evil.jpg' has 8589934591 bytes"),
        (raw_header("a/evil.jpg", b"\x80" + b"\0" * 3 + b"\xff" * 8), r"has 18446744073709551615 bytes"),
        # Leads back to its own header; newer Pythons notice it themselves.
        (tar("good.jpg")[:2560] + raw_header("a/evil.jpg", b"\xff" * 10 + b"\xfe\0"), r"has -512 bytes|damaged"),
        (raw_header("name", b"7" * 11 + b"\0", tarfile.GNUTYPE_LONGNAME), r"damaged .*headers of more than 262144"),
        (raw_header("name", b"7" * 11 + b"\0", tarfile.XHDTYPE), r"damaged .*headers of more than 262144"),
        (raw_header("name", b"\xff" * 10 + b"\x02\0", tarfile.XHDTYPE), r"damaged"),
        # Noticed on the way, before what is wrong at its end.
        (
            tar(*(f"{i}.jpg" for i in range(30)))[: 30 * 2560] + b"\7" * 512,
            r"x.tar.gz: holds more than the 40000 bytes that are allowed",
        ),
        (tar() + b"\0" * 100_000, r"x.tar.gz: holds more than the 40000 bytes"),
    ],
)
def test_bombs_are_refused_with_nothing_unpacked(unpacked, tmp_path, content, why):
    with pytest.raises(ArchiveError, match=why) as raised:
        unpacked(content=gzip.compress(content), member_bytes=2500, total_bytes=40_000)
    assert str(raised.value).startswith(f"{tmp_path / 'x.tar.gz'}: ") and str(raised.value).isprintable()
    assert tree(tmp_path / "out") == {}


def test_a_bomb_is_not_inflated_to_be_passed_over(unpacked, tmp_path):
    """256 MB of zeros, 0.25 MB of gzip, by the default limits: only a part of it may be read."""
    bomb = gzip.compress(raw_header("a/evil.jpg", b"%011o\0" % (2**28 + 1)) + bytes(2**22), 1)
    start = time.process_time()
    with pytest.raises(ArchiveError, match=r"has 268435457 bytes"):
        unpacked(content=bomb)
    assert time.process_time() - start < 5


def test_sparse_members_are_passed_over(unpacked):
    """Their content may be a thousand times what the archive holds."""
    header = bytearray(raw_header("a/evil.jpg", b"%011o\0" % 512, tarfile.GNUTYPE_SPARSE))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512  # a piece of 512 bytes at 0
    header[483:495] = b"%011o\0" % 100_000  # of a file of so many
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    result, written = unpacked(content=gzip.compress(bytes(header) + b"x" * 512 + tar("good.jpg")))
    assert result.first == "'a/evil.jpg' is no regular file" and list(written) == ["jpg/good.jpg"]


def gzip_content(packed: bytes) -> bytes | None:
    """By the gzip of the system."""
    run = subprocess.run(["gzip", "-dc"], input=packed, capture_output=True)
    return None if run.returncode else run.stdout


def test_archives_cut_short_or_changed_anywhere_leave_nothing(unpacked, tmp_path):
    plain = tar("good.jpg", "a/evil.jpg")
    whole = gzip.compress(plain, 1)
    damaged = [whole[:end] for end in (0, 1, 9, 10, 300, 1000, 2600, len(whole) // 2, len(whole) - 8, len(whole) - 1)]
    rng = random.Random(1)
    for _ in range(150):
        at = rng.randrange(10, len(whole))  # before it lie the time and other things that do not matter
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    damaged.append(b"<html>not found</html>" * 50)
    damaged += [gzip.compress(plain[:end]) for end in (100, 512, 600, 2000, 3584 + 100)]  # a correct checksum over it
    damaged += [gzip.compress(plain[:at] + b"\x07" + plain[at + 1 :]) for at in (0, 130, 150, 3000 + 2)]
    for number, content in enumerate(damaged):
        if gzip_content(content) == plain:
            continue  # a bit without meaning was changed
        with pytest.raises(ArchiveError, match=r"x.tar.gz: a damaged archive") as raised:
            unpacked(content=content)
        assert "\n" not in str(raised.value)
        assert tree(tmp_path / "out") == {}, number
    assert len(unpacked(content=whole)[1]) == 2


def test_what_is_there_already_is_left_alone_and_what_differs_replaced(unpacked, tmp_path):
    jpg = tmp_path / "out/jpg"
    (jpg / "a").mkdir(parents=True)
    (jpg / "good.jpg").write_bytes(photo("good.jpg"))
    (jpg / "other.jpg").write_bytes(b"mine")
    (tmp_path / "mine").write_bytes(b"mine")
    (jpg / "a/evil.jpg").symlink_to(tmp_path / "mine")
    before = (jpg / "good.jpg").stat()
    result, _ = unpacked("good.jpg", "a/evil.jpg")
    assert result == Unpacked(images=2, kept=1, passed_over=0, first="")
    assert (jpg / "good.jpg").stat() == before
    assert (jpg / "a/evil.jpg").read_bytes() == photo("a/evil.jpg") and not (jpg / "a/evil.jpg").is_symlink()
    assert (tmp_path / "mine").read_bytes() == (jpg / "other.jpg").read_bytes() == b"mine"


def test_rests_of_a_killed_process_are_removed(unpacked, tmp_path):
    rests = tmp_path / "out/jpg/.unpacking"
    rests.mkdir(parents=True)
    (rests / "000000.part").write_bytes(b"rest")
    assert unpacked("good.jpg")[1] == {"jpg/good.jpg": photo("good.jpg")}
    assert not rests.exists()


def test_a_full_disk_is_one_line_that_names_the_place(unpacked, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    archive = tar_gz(("good.jpg", bytes(100_000)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(archive) + 10_000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            unpacked(content=archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = tmp_path / "out/jpg/.unpacking/000000.part"
    assert ending(raised.value) == (2, f"{place}: {os.strerror(raised.value.errno)}")
    assert tree(tmp_path / "out") == {} and not place.parent.exists()
