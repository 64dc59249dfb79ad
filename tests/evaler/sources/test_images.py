"""Which images are described, under which names, and what their bytes are."""

import contextlib
import hashlib
import io
import os
import pickle
import subprocess
import tarfile
import threading
import tracemalloc
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from datasets.images.decode import ImageError, decode
from datasets.landmark import read_list
from evaler.sources import image_list, tar_index
from evaler.sources.image_list import ImageList, LooseFiles
from evaler.sources.images import crop, distractors, named_images, read_cropped, revisited_set
from tests.small_run import photograph, retrieval_set, write_image


@pytest.fixture
def tree(tmp_path):
    """A folder with equal basenames, several kinds of files, and sub-folders."""
    root = tmp_path / "photos"
    for seed, name in enumerate(("b/one.jpg", "a/one.jpg", "a/deep/two.PNG", "three.jpeg")):
        write_image(root / name, photograph(seed))
    (root / "a" / "readme.txt").touch()
    (root / "no_extension").touch()
    (root / "folder.jpg").mkdir()
    return root


NAMES = ["a/deep/two.PNG", "a/one.jpg", "b/one.jpg", "three.jpeg"]


def named(path, cache_dir=None) -> ImageList:
    return named_images(path, cache_dir=cache_dir)[0]


def contents(images: ImageList) -> dict[str, bytes]:
    return {name: images.read(index) for index, name in enumerate(images.names)}


def refusal(path) -> str:
    with pytest.raises(ImageError) as raised:
        named_images(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


# ------------------------------------------------------------------------------------------------------------ cropping


def test_crop_truncates_the_box():
    image = np.arange(10 * 12 * 3).reshape(10, 12, 3)
    assert crop(image, None) is image
    np.testing.assert_array_equal(crop(image, (1.9, 2.2, 7.99, 9.5)), image[2:9, 1:7])
    np.testing.assert_array_equal(crop(image, (0, 0, 12, 10)), image)
    np.testing.assert_array_equal(crop(image, (8, 6, 50.5, 50.5)), image[6:, 8:])  # cut off at the border, as published


def test_only_the_box_is_read(tmp_path):
    path = write_image(tmp_path / "a.png", photograph(0, 20, 30))
    files = LooseFiles(tmp_path, ["a", "a", "a"], suffix=".png")
    images = ImageList(["1", "2", "3"], files, [(2.5, 3.5, 10.5, 12.5), None, (40, 0, 50, 9)])
    np.testing.assert_array_equal(read_cropped(images, 0), decode(path)[3:12, 2:10])
    np.testing.assert_array_equal(read_cropped(images, 1), decode(path))
    with pytest.raises(ImageError, match=rf"^{path}: the query's box \(40, 0, 50, 9\) lies outside the picture"):
        read_cropped(images, 2)
    with pytest.raises(ImageError, match=rf"^{path}: 30 x 20 pixels"):
        read_cropped(images, 0, max_pixels=599)


# ---------------------------------------------------------------------------------------------------- lists and hashes


def test_the_hash_of_a_list_changes_with_all_that_matters(tree):
    images = named(tree)
    hashes = {images.sha256()}
    assert named(tree).sha256() in hashes
    reverse = images.names[::-1]
    hashes.add(ImageList(reverse, LooseFiles(tree, reverse)).sha256())
    hashes.add(ImageList(["x", *images.names[1:]], LooseFiles(tree, images.names)).sha256())
    hashes.add(ImageList(images.names, LooseFiles(tree, images.names), [(0, 0, 9, 9), None, None, None]).sha256())
    with open(tree / NAMES[0], "ab") as file:
        file.write(b"\0")
    hashes.add(images.sha256())
    (tree / NAMES[0]).unlink()
    hashes.add(images.sha256(missing_ok=True))
    assert len(hashes) == 6


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_the_hash_is_that_of_a_table(tree, monkeypatch, block):
    monkeypatch.setattr(image_list, "BLOCK", block)  # how many are asked for at once does not matter
    images = ImageList(NAMES, LooseFiles(tree, NAMES), [None, (1.5, 2, 3, 4), None, None])
    rows = [f"{name}\t{images.box(i)}\t{(tree / name).stat().st_size}\n" for i, name in enumerate(NAMES)]
    assert images.sha256() == hashlib.sha256("".join(rows).encode()).hexdigest()


def test_missing_images_are_counted_and_the_first_is_named(tree):
    images = named(tree)
    (tree / NAMES[1]).unlink()
    (tree / NAMES[3]).unlink()
    with pytest.raises(ImageError, match=rf"^{tree / NAMES[1]}: no such image \(2 of 4 images missing\)"):
        images.sha256()
    assert len(images.sha256(missing_ok=True)) == 64


@pytest.mark.parametrize("crop_query", [True, False])
def test_a_revisited_set(tmp_path, crop_query):
    sets = revisited_set(retrieval_set(tmp_path), "toy", crop_query=crop_query)
    assert list(sets) == ["queries", "database"]
    assert sets["queries"].names == ["query0", "query1"]
    assert sets["database"].names == [f"image{i}" for i in range(5)]
    assert sets["queries"].source(1) == str(tmp_path / "toy" / "jpg" / "query1.jpg")
    assert sets["queries"].read(1) == (tmp_path / "toy" / "jpg" / "query1.jpg").read_bytes()
    boxes = [(3.7, 2.2, 40.9, 44.1), (3.7, 2.2, 40.9, 45.1)]
    assert [sets["queries"].box(i) for i in range(2)] == (boxes if crop_query else [None, None])
    assert [sets["database"].box(i) for i in range(5)] == [None] * 5


def test_distractors_are_those_of_the_list_in_its_order(tmp_path, tree):
    (tmp_path / "revisitop1m").mkdir()
    with pytest.raises(ImageError, match=r"revisitop1m\.txt: no such list; `sh scripts/download_revisitop\.sh revis"):
        distractors(tmp_path)
    tree.rename(tmp_path / "revisitop1m" / "jpg")
    (tmp_path / "revisitop1m" / "revisitop1m.txt").write_text("three.jpeg\nb/one.jpg\n")
    images = distractors(tmp_path)
    assert images.names == ["three.jpeg", "b/one.jpg"] and images.box(0) is None
    assert images.read(1) == (tmp_path / "revisitop1m" / "jpg" / "b" / "one.jpg").read_bytes()


def test_files_that_cannot_be_read_are_named_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**29 + 1)
    reasons = {
        "absent": "no such file",
        "folder": "a folder, not an image file",
        "empty": "the file is empty",
        "pipe": "not a regular file (a pipe or device)",
        "circle": "cannot be read (Too many levels of symbolic links)",
        "huge": "536870913 bytes, more than 268435456 (mend: compress it, or make it smaller)",
    }
    images = ImageList(list(reasons), LooseFiles(tmp_path, list(reasons)))
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(ImageError) as raised:
            read_cropped(images, index)
        assert str(raised.value) == f"{tmp_path}/{name}: {reason}"


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_listed_by_relative_path(tree):
    images, notes = named_images(tree)
    assert images.names == NAMES and len(images) == 4
    assert [images.source(i) for i in range(4)] == [str(tree / name) for name in NAMES]
    assert contents(images) == {name: (tree / name).read_bytes() for name in NAMES}
    assert [images.box(i) for i in range(4)] == [None] * 4
    assert notes == [f"2 files in {tree} have no image's extension and are left out"]


def test_places_that_hold_nothing_to_describe(tmp_path, tree):
    assert refusal(tmp_path / "absent").endswith("absent: no such folder, list file or tar archive")
    assert "no image in it, and no .tar archive (looked for .bmp " in refusal(tree / "folder.jpg")
    assert refusal(tree / "three.jpeg").endswith("name a folder of images, a list file or a tar archive")
    os.mkfifo(tmp_path / "pipe")
    assert "name a folder" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("name", [b"a\tb.jpg", b"a\nb.jpg", b"a\xffb.jpg"])
def test_a_name_that_could_not_be_written_down_is_refused_before_the_work(tree, name):
    with open(os.path.join(os.fsencode(tree), name), "wb"):
        pass
    assert "rename that file" in refusal(tree)


def test_unusual_names_are_fine(tree):
    for name in ("ä ö.jpg", "a\u00a0b.jpg", "x'y\".jpg", "a..b.jpg"):
        write_image(tree / "c.jpg", photograph(9)).rename(tree / name)
    assert len(named(tree)) == 8


HIDDEN = (
    *("a/._one.jpg", ".a.jpg", "..b.jpg", "a/.ipynb_checkpoints/one-checkpoint.jpg", ".Trash-1000/files/x.jpg"),
    *(".thumbnails/x.png", "@eaDir/one.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/x.jpg", "$RECYCLE.BIN/S-1/$R1.jpg"),
    *("__MACOSX/a/x.jpg", "a/System Volume Information/x.jpg", "Thumbs.db", ".archive.tar", "lost+found/x.jpg"),
)


def test_hidden_and_system_files_are_left_out_of_folders_and_archives_and_told(tmp_path, tree):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in (*HIDDEN, *NAMES, *(f"./{name}" for name in HIDDEN)):
            add(tar, name, b"x")
    for name in HIDDEN:
        write_image(tree / "c.jpg", photograph(9)).rename(_made(tree / name))
    images, notes = named_images(tree)
    assert images.names == NAMES
    assert notes[-1] == f"14 hidden or system files and folders in {tree} are left out, the first is '#recycle'"
    for _ in range(2):  # read, and as it was kept
        images, notes = named_images(tmp_path / "x.tar", cache_dir=tmp_path / "cache")
        assert images.names == NAMES
        assert notes == [
            f"28 hidden or system files and folders in {tmp_path}/x.tar are left out, the first is 'a/._one.jpg'"
        ]
    (tree / "list.txt").write_text("\n".join(HIDDEN[:2]))
    assert named(tree / "list.txt").names == list(HIDDEN[:2])  # a list is meant as it stands


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_where_all_is_hidden_it_is_told(tmp_path):
    write_image(tmp_path / "photos" / ".a" / "b.jpg", photograph(9))
    assert refusal(tmp_path / "photos").endswith("the first is '.a'")
    make_tar(tmp_path / "x.tar", {".a/b.jpg": b"b"})
    assert refusal(tmp_path / "x.tar").endswith("the first is '.a/b.jpg'")
    assert named(tmp_path / "photos" / ".a").names == ["b.jpg"]  # the folder that is asked for may be hidden


def test_links_are_followed_but_not_in_circles(tmp_path, tree):
    other = tmp_path / "other"
    write_image(other / "inner" / "x.jpg", photograph(8))
    (other / "back").symlink_to(other)
    (other / "inner" / "home").symlink_to(tree)
    (tree / "away").symlink_to(other)
    (tree / "again").symlink_to(other / "inner")
    (tree / "z.jpg").symlink_to("three.jpeg")
    images, notes = named_images(tree)
    assert images.names == sorted([*NAMES, "again/x.jpg", "away/inner/x.jpg", "z.jpg"])
    assert [note.split()[0] for note in notes[:-1]] == ["again/home", "away/back", "away/inner/home"]
    images.sha256()


def test_a_link_that_leads_nowhere_is_a_missing_image(tree):
    (tree / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ImageError, match=r"gone\.jpg: no such image \(1 of 5 images missing\)"):
        named(tree).sha256()


# ---------------------------------------------------------------------------------------------------------- list files


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_a_list_file_gives_names_and_order(tree, ending, mark, last):
    names = ["three.jpeg", "b/one.jpg", "./a//./deep/two.PNG", "ä ö"]
    write_image(tree / "c.jpg", photograph(9)).rename(tree / "ä ö")
    (tree / "my.list").write_bytes(mark + ending.join(name.encode() for name in names) + ending * last)
    images, notes = named_images(tree / "my.list")
    assert images.names == ["three.jpeg", "b/one.jpg", "a/deep/two.PNG", "ä ö"] and notes == []
    assert contents(images) == {name: (tree / name).read_bytes() for name in images.names}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", ": an empty list"),
        (b"\n\n", ": an empty list"),
        (b"a.jpg\n\nb.jpg\n", ", line 2: empty, with names behind it; remove it"),
        (b"a.jpg\n/b.jpg\n", ", line 2: '/b.jpg' is an absolute path, a relative one is wanted"),
        (b"a/../b.jpg\n", ", line 1: 'a/../b.jpg' leads out of its folder by `..`"),
        (b"a/..\n", "leads out"),
        (b"a\tb.jpg\n", ", line 1: 'a\\tb.jpg' holds a tab"),
        (b"a.jpg\nb.jpg\rc.jpg\n", ", line 2: 'b.jpg\\rc.jpg' holds a tab, a line break"),
        (b"a.jpg\nb\xff.jpg\n", ", line 2: 'b\\udcff.jpg' holds a tab, a line break or no UTF-8"),
        (b"a.jpg\nb.jpg\na.jpg\n", ": a.jpg stands in line 1 and again in line 3"),
        (b"a.jpg\n./a.jpg\n", ": a.jpg stands in line 1 and again in line 2"),
        ("a.jpg\n".encode("utf-16"), ": not a text file in UTF-8"),
        (b"\x89PNG\0\0", ": not a text file in UTF-8"),
        (b"x" * 70_000 + b"\0\n", "holds a tab"),
    ],
)
def test_lists_that_are_refused(tmp_path, content, what):
    (tmp_path / "my.txt").write_bytes(content)
    message = refusal(tmp_path / "my.txt")
    assert message.startswith(f"INFER.IMAGES {tmp_path / 'my.txt'}") and what in message and len(message) < 1000


def test_a_list_of_training_is_read_as_training_reads_it(tmp_path, tree):
    """`path label` lines: relative to the list, absolute, by `..`, with blanks; named alike by lists of one folder."""
    write_image(tree / "a" / "with 2 blanks 7.jpg", photograph(9))
    away = write_image(tmp_path / "away" / "x.jpg", photograph(10))
    places = ["a/one.jpg", f"{tree}/b/one.jpg", str(away), "../away/../photos/three.jpeg", "a/with 2 blanks 7.jpg"]
    (tree / "val_list.txt").write_text("\ufeff" + "".join(f"{place} {k}\r\n" for k, place in enumerate(places)))
    images, notes = named_images(tree / "val_list.txt")
    assert images.names == ["a/one.jpg", "b/one.jpg", str(away)[1:], "three.jpeg", "a/with 2 blanks 7.jpg"]
    assert notes == [] and read_list(tree / "val_list.txt", root=tree)[1].tolist() == [0, 1, 2, 3, 4]
    for index, place in enumerate(read_list(tree / "val_list.txt", root=tree)[0]):
        assert images.read(index) == Path(place).read_bytes()
        assert Path(images.source(index)).samefile(place)
    assert images.sha256() and pickle.loads(pickle.dumps(images)).source(2) == str(away)


def test_a_list_of_paths_that_end_with_numbers_is_one_of_paths(tmp_path):
    for index in range(2):
        write_image(tmp_path / "x.png", photograph(index)).rename(tmp_path / f"picture {index}")
    (tmp_path / "list.txt").write_text("picture 0\npicture 1\n")
    assert named(tmp_path / "list.txt").names == ["picture 0", "picture 1"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a.jpg 0\n\nb.jpg 1\n", ", line 2: a blank line between others"),
        (b"a.jpg 0\nb.jpg -1\n", ", line 2: the label -1 is negative"),
        (b"a.jpg 0\nb.jpg " + b"9" * 5000 + b"\n", ", line 2: the label 99999999999999999999... does not fit"),
        (b"a.jpg 0\nb\xff.jpg 1\n", ", line 2: not UTF-8 text"),
        (b"a.jpg 0\nb\0/../c.jpg 1\n", "holds a zero byte"),
        (b"a.jpg 0\nc/../a.jpg 1\n", "a.jpg stands in line 1 and again in line 2"),
        (b"a.jpg 0\nb.jpg\n", "a.jpg 0: no such image"),
    ],
)
def test_lists_of_training_that_are_refused(tmp_path, content, what):
    (tmp_path / "c").mkdir()
    (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as raised:
        named(tmp_path / "my.txt").sha256()
    assert what in str(raised.value)


def test_a_long_list_takes_little_memory(tmp_path):
    names = [f"{i % 16:x}/{i % 7}/{i * 2654435761 % 2**32:016x}.jpg" for i in range(100_000)]
    (tmp_path / "long.txt").write_text("\n".join(names))
    tracemalloc.start()
    images = named(tmp_path / "long.txt")
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert images.names == names
    assert taken / len(names) < 110  # bytes: a name of 26 characters takes 75 and 8
    for name in (names[5], names[99_999]):
        write_image(tmp_path / name, photograph(0))
    with pytest.raises(ImageError, match=rf"^{tmp_path}/{names[0]}: no such image \(99998 of 100000 images missing"):
        images.sha256()
    size = os.path.getsize(tmp_path / names[5])
    rows = (f"{name}\tNone\t{size if i in (5, 99_999) else -1}\n" for i, name in enumerate(names))
    assert images.sha256(missing_ok=True) == hashlib.sha256("".join(rows).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- tar archives


def make_tar(path: Path, members: dict[str, bytes], **more) -> Path:
    """An archive of files with these contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


LONG = "/".join(["ä" * 20] * 12) + "/x.jpg"
MEMBERS = {"b/1.jpg": b"one", "./a/2.PNG": bytes(5000), "c.txt": b"text", LONG: b"long", "a/0.jpg": b"x" * 512}
INSIDE = {name.removeprefix("./"): content for name, content in MEMBERS.items() if name != "c.txt"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_without_unpacking(tmp_path, form):
    path = make_tar(tmp_path / "shard.tar", MEMBERS, format=form)
    images, notes = named_images(path)
    assert list(contents(images).items()) == list(INSIDE.items())  # in the order of the archive
    assert images.source(0) == f"{path}: b/1.jpg"
    assert notes == [f"1 members of {path} have no image's extension and are left out"]
    rows = "".join(f"{name}\tNone\t{len(content)}\n" for name, content in INSIDE.items())
    assert images.sha256() == hashlib.sha256(rows.encode()).hexdigest()


def test_real_photographs_in_an_archive_of_the_tar_command(tmp_path, shared):
    files = sorted((shared / "distractors" / "jpg").glob("*.jpg"))[:6]
    command = ["tar", "-cf", tmp_path / "x.tar", "-C", files[0].parent.parent, *(f"./jpg/{f.name}" for f in files)]
    subprocess.run(command, check=True)
    images = named(tmp_path / "x.tar")
    assert images.names == [f"jpg/{file.name}" for file in files]
    for index, file in enumerate(files):
        np.testing.assert_array_equal(read_cropped(images, index), decode(file))


def test_a_folder_of_archives_is_one_list(tmp_path):
    make_tar(tmp_path / "t" / "2.tar", {"z.jpg": b"z", "a.jpg": b"a"})
    make_tar(tmp_path / "t" / "10.TAR", {"b.jpg": b"b"})
    make_tar(tmp_path / "t" / "11.tar", {})
    make_tar(tmp_path / "t" / "in" / "0.tar", {"c.jpg": b"c", "no": b""})
    images, notes = named_images(tmp_path / "t")
    assert list(contents(images).items()) == [("b.jpg", b"b"), ("z.jpg", b"z"), ("a.jpg", b"a"), ("c.jpg", b"c")]
    assert len(notes) == 1
    assert images.source(3) == f"{tmp_path}/t/in/0.tar: c.jpg"


def test_archives_among_other_files(tmp_path, tree):
    make_tar(tree / "x.tar", INSIDE)
    assert f"holds images ({NAMES[0]}) and archives (x.tar); name one of them" in refusal(tree)
    make_tar(tmp_path / "t" / "1.tar", INSIDE)
    (tmp_path / "t" / "2.tar.gz").touch()
    assert "2.tar.gz: compressed" in refusal(tmp_path / "t")
    (tmp_path / "t" / "1.tar").unlink()
    assert "gunzip" in refusal(tmp_path / "t")
    (tree / "x.tar").rename(tree / "x.tar.gz")  # beside images, like any other file
    assert len(named(tree)) == 4


def refused_tar(path: Path) -> str:
    message = refusal(path)
    assert message.startswith(str(path))
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_archives_are_refused_whatever_their_name(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", f"w:{kind}") as tar:
        add(tar, "a.jpg", b"a" * 100)
    assert refused_tar(tmp_path / "x.tar").startswith("compressed, its members cannot be read at random")
    (tmp_path / "x.tar").rename(tmp_path / f"x.tar.{kind}")
    assert "compressed" in refusal(tmp_path / f"x.tar.{kind}")


def test_members_that_are_no_plain_files(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", b"a")
        add(tar, "b.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(tar, "c.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "pipe", type=tarfile.FIFOTYPE)
        add(tar, "empty.jpg")
    images, notes = named_images(tmp_path / "x.tar")
    assert images.names == ["a.jpg", "empty.jpg"]
    assert notes[0].startswith(f"2 images in {tmp_path}/x.tar are links") and notes[1].startswith("1 members of ")
    with pytest.raises(ImageError, match=rf"^{tmp_path}/x\.tar: empty\.jpg: the file is empty"):
        images.read(1)
    make_tar(tmp_path / "none.tar", {"a.txt": b""})
    assert "no image in the archive" in refusal(tmp_path / "none.tar")


def test_sparse_members_are_refused(tmp_path):
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.truncate(1_000_000)
        file.seek(500_000)
        file.write(b"x")
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "-cSf", "x.tar", f"--format={form}", "holes.jpg"], cwd=tmp_path, check=True)
        assert refused_tar(tmp_path / "x.tar") == "'holes.jpg' is stored as a sparse file; pack without --sparse"


@pytest.mark.parametrize(
    ("name", "what"),
    [("/a.jpg", "absolute"), ("a/../b.jpg", "`..`"), ("a\tb.jpg", "tab"), ("a\udcff.jpg", "no UTF-8")],
)
def test_member_names_that_are_refused(tmp_path, name, what):
    path = make_tar(tmp_path / "x.tar", {name: b"x"}, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    assert refused_tar(path).startswith(f"{name!a} ") and what in refused_tar(path)


def test_a_name_in_two_archives_is_refused_naming_both(tmp_path):
    one = make_tar(tmp_path / "t" / "1.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    make_tar(tmp_path / "t" / "2.tar", {"c.jpg": b"c"})
    three = make_tar(tmp_path / "t" / "3.tar", {"./b.jpg": b"b"})
    assert refusal(tmp_path / "t") == f"{three}: b.jpg is in {one} too"
    assert refused_tar(make_tar(tmp_path / "x.tar", {"a.jpg": b"", "./a.jpg": b""})) == "a.jpg is in it twice"


def test_cut_or_damaged_archives_are_refused(tmp_path):
    path = make_tar(tmp_path / "x.tar", MEMBERS, format=tarfile.GNU_FORMAT)
    good, spoilt = path.read_bytes(), tmp_path / "y.tar"
    with tarfile.open(path) as tar:
        heads = [member.offset for member in tar]
        end = tar.offset
    for size in [0, 1, *range(256, end + 512, 256)]:
        spoilt.write_bytes(good[:size])
        assert "truncated or damaged archive" in refused_tar(spoilt), size
    spoilt.write_bytes(good[: end + 512])
    assert contents(named(spoilt)) == INSIDE  # one block of zeros will do
    for head in heads:
        spoilt.write_bytes(good[: head + 50] + b"?" + good[head + 51 :])
        assert "damaged archive" in refused_tar(spoilt)
    spoilt.write_bytes(good + good)
    assert refused_tar(spoilt).startswith("goes on behind its end mark")


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_a_member_larger_than_any_file_is_refused(tmp_path, name):
    path = make_tar(tmp_path / "x.tar", {name: b"a"}, format=tarfile.GNU_FORMAT)
    spoilt = bytearray(path.read_bytes())
    spoilt[124:136] = b"\x80" + b"\xff" * 11  # the size, in the form for what octal digits cannot hold
    spoilt[148:156] = b" " * 8
    spoilt[148:156] = b"%06o\0 " % sum(spoilt[:512])
    path.write_bytes(spoilt)
    assert "damaged archive" in refused_tar(path)


def test_random_damage_never_ends_in_another_error(tmp_path):
    path, rng = make_tar(tmp_path / "x.tar", MEMBERS), np.random.default_rng(0)
    good = np.frombuffer(path.read_bytes(), np.uint8)
    with tarfile.open(path) as tar:
        heads = [offset for member in tar for offset in range(member.offset, member.offset_data, 512)]
    for _ in range(250):
        spoilt, head = good.copy(), rng.choice(heads)
        spoilt[head + rng.integers(0, 512, 2)] = rng.integers(0, 256, 2)
        spoilt[head + 148 : head + 156] = 32  # with a fitting checksum, or hardly anything would be read
        checksum = b"%06o\0 " % int(spoilt[head : head + 512].sum(dtype=np.int64))
        spoilt[head + 148 : head + 156] = np.frombuffer(checksum, np.uint8)
        path.write_bytes(spoilt.tobytes())
        with contextlib.suppress(ImageError):
            contents(named(path))


# ------------------------------------------------------------------------------------------------ an index that is kept


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """Note each time that archives are read through."""
    calls, build = [], tar_index._build
    monkeypatch.setattr(tar_index, "_build", lambda archives: calls.append(len(archives)) or build(archives))
    return calls


@pytest.fixture
def shards(tmp_path) -> Path:
    make_tar(tmp_path / "t" / "1.tar", INSIDE)
    make_tar(tmp_path / "t" / "2.tar", {"c.jpg": b"c", "d": b"", "e.jpg": b""})
    with tarfile.open(tmp_path / "t" / "2.tar", "a") as tar:
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="c.jpg")
    return tmp_path / "t"


def test_the_index_is_used_again(tmp_path, shards, builds):
    first, notes = named_images(shards, cache_dir=tmp_path / "cache")
    again, same_notes = named_images(shards, cache_dir=tmp_path / "cache")
    assert builds == [2] and notes == same_notes and len(notes) == 2
    assert again.names == first.names == [*INSIDE, "c.jpg", "e.jpg"]
    assert [again.read(i) for i in range(5)] == [*INSIDE.values(), b"c"]
    assert again.sha256() == first.sha256()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary file is left


def test_an_index_of_archives_that_have_changed_is_made_again(tmp_path, shards, builds):
    def name_them() -> list[str]:
        return named(shards, tmp_path / "cache").names

    before = name_them()
    os.utime(shards / "2.tar", ns=(0, 1))
    assert name_them() == before and len(builds) == 2  # time
    times = (shards / "2.tar").stat()
    make_tar(shards / "2.tar", {f"{i}.jpg": bytes(9000) for i in range(3)})
    os.utime(shards / "2.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert name_them()[-1] == "2.jpg" and len(builds) == 3  # size
    (shards / "2.tar").rename(shards / "3.tar")
    assert name_them()[-1] == "2.jpg" and len(builds) == 4  # path
    (shards / "1.tar").unlink()
    assert len(name_them()) == 3 and len(builds) == 5  # number
    assert len(name_them()) == 3 and len(builds) == 5


def test_a_damaged_index_is_made_again(tmp_path, shards, builds):
    before = contents(named(shards / "1.tar", tmp_path / "cache"))
    (cache,) = (tmp_path / "cache").iterdir()
    good, rng = cache.read_bytes(), np.random.default_rng(0)
    damages = [b"", good[:30], good[:-1], good + b"x", b"\n", pickle.dumps({}), b"\0" * len(good)]
    for place in [0, 64, 65, len(good) - 1, *rng.integers(0, len(good), 20).tolist()]:
        damages.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for number, damage in enumerate(damages, start=2):
        cache.write_bytes(damage)
        assert contents(named(shards / "1.tar", tmp_path / "cache")) == before
        assert len(builds) == number and cache.read_bytes() == good
    cache.write_bytes(good)
    named(shards / "1.tar", tmp_path / "cache")
    assert len(builds) == len(damages) + 1


def test_an_index_of_another_version_is_made_again(tmp_path, shards, builds, monkeypatch):
    named(shards, tmp_path / "cache")
    monkeypatch.setattr(tar_index, "VERSION", tar_index.VERSION + 1)
    named(shards, tmp_path / "cache")
    assert len(builds) == 2


def test_an_archive_that_is_replaced_while_it_is_in_use(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    images, later, too_late = named(path), named(path), named(path)
    assert images.read(0) == b"a"
    make_tar(tmp_path / "y.tar", {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"c" * 20_000}).rename(path)
    assert images.read(1) == b"b"  # the open one is still the old one
    with pytest.raises(ImageError, match=rf"^{path}: a\.jpg: the archive has changed since it was indexed"):
        later.read(0)
    path.unlink()
    with pytest.raises(ImageError, match=rf"^{path}: a\.jpg: cannot be read \(No such file"):
        too_late.read(0)


def test_an_archive_that_is_still_being_written(tmp_path, monkeypatch):
    path, members = make_tar(tmp_path / "x.tar", {"a.jpg": b"a"}), tar_index._members

    def slow(name, file):
        yield from members(name, file)
        os.utime(path, ns=(0, 1))

    monkeypatch.setattr(tar_index, "_members", slow)
    assert refused_tar(path) == "has changed while it was read; wait until it is complete"


# --------------------------------------------------------------------------------------------- many readers at one time


@pytest.fixture
def many(tmp_path) -> tuple[ImageList, list[bytes]]:
    """Three archives, so that readers change between them, and what they hold."""
    rng = np.random.default_rng(0)
    expected = [bytes([i % 256]) * int(size) for i, size in enumerate(rng.integers(1, 3000, 600))]
    for part in range(3):
        make_tar(tmp_path / "t" / f"{part}.tar", {f"{i}.jpg": expected[i] for i in range(part * 200, part * 200 + 200)})
    return named(tmp_path / "t"), expected


def wrong_reads(images: ImageList, expected: list[bytes], seed: int) -> int:
    order = np.random.default_rng(seed).integers(0, len(images), 2000)
    return sum(images.read(int(i)) != expected[i] for i in order)


def report(queue, *arguments) -> None:
    queue.put(wrong_reads(*arguments))


def test_forked_processes_read_one_archive_at_once(many):
    images, expected = many
    assert images.read(0) == expected[0]  # they inherit an open archive
    context = get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=report, args=(queue, *many, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    assert wrong_reads(*many, 9) == 0
    assert [queue.get() for _ in processes] == [0] * 4
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_list_travels_to_a_spawned_process(many):
    images, expected = many
    images.read(0)
    assert wrong_reads(pickle.loads(pickle.dumps(images)), expected, 0) == 0


def test_threads_read_one_archive_at_once_and_close_what_they_opened(many):
    before = len(os.listdir("/proc/self/fd"))
    found = []
    threads = [threading.Thread(target=lambda seed=seed: found.append(wrong_reads(*many, seed))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0] * 4
    assert len(os.listdir("/proc/self/fd")) <= before + 1
