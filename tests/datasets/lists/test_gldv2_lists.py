"""List files from GLDv2's tables, other tables and folders: against a slower version, and with hostile input."""

import csv
import hashlib
import io
import os
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest

from datasets.landmark import read_list
from datasets.lists import output as list_output
from datasets.lists import selection as list_selection
from datasets.lists.command import main, make_lists
from datasets.lists.sources import SourceError, read_csv
from evaler.sources.images import named_images
from tests.small_run import ROOT, python

LISTS = ("train_list.txt", "val_list.txt", "labels.csv")


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def place(root: Path, image: str) -> Path:
    return root / image[0] / image[1] / image[2] / f"{image}.jpg"


def landmarks_of(sizes: list[int], *, seed: int = 0) -> dict[int, list[str]]:
    """Landmark id -> image ids, for the sizes given."""
    draw = random.Random(seed)
    landmarks = draw.sample(range(1, 200_000), len(sizes))
    return {k: [f"{draw.getrandbits(64):016x}" for _ in range(size)] for k, size in zip(landmarks, sizes, strict=True)}


def clean_csv(images: dict[int, list[str]]) -> str:
    return "landmark_id,images\n" + "".join(f"{k},{' '.join(ids)}\n" for k, ids in images.items())


def gldv2(folder: Path, images: dict[int, list[str]]) -> Path:
    """Write the table and (empty) image files where they lie by default; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_clean.csv").write_text(clean_csv(images))
    for ids in images.values():
        for image in ids:
            touch(place(folder / "train", image))
    return folder


def written(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in LISTS if (out / name).exists()}


def slow_lists(images: dict[int, list[str]], *, share: float = 0.2, seed: int = 0) -> dict[str, bytes]:
    """The three files, image by image."""
    texts = defaultdict(str, {"labels.csv": "label,landmark_id,images\n"})
    for label, landmark in enumerate(sorted(images)):
        paths = [f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg" for i in images[landmark]]
        drawn = sorted(paths, key=lambda path: hashlib.blake2b(f"{seed} {path}".encode(), digest_size=8).digest())
        wanted = int(len(paths) * share + 0.5)
        if share > 0:
            wanted = 0 if len(paths) == 1 else min(max(wanted, 1), len(paths) - 1)
        for path in sorted(paths):
            texts["val_list.txt" if path in drawn[:wanted] else "train_list.txt"] += f"train/{path} {label}\n"
        texts["labels.csv"] += f"{label},{landmark},{len(paths)}\n"
    return {name: text.encode() for name, text in texts.items()}


def refusal(capsys, *arguments) -> str:
    """The one line with which the command stops."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(err) == 1 and err[0].startswith("error: ")
    return err[0].removeprefix("error: ")


SIZES = [1, 2, 3, 5, 7, 8, 12, 13, 40, 1, 2, 29, 4]


# ------------------------------------------------------------------------------------------ Google Landmarks v2


@pytest.mark.parametrize(("share", "seed"), [(0.2, 0), (0.2, 7), (0.5, 0), (0.01, 0), (0.99, 0), (0, 0)])
def test_the_clean_table_gives_what_a_slower_version_gives(tmp_path, share, seed):
    images = landmarks_of(SIZES)
    out = gldv2(tmp_path, images)
    make_lists(out=out, val=share, seed=seed)
    assert written(out) == slow_lists(images, share=share, seed=seed)


def test_the_lists_are_read_by_training(tmp_path):
    images = landmarks_of(SIZES)
    make_lists(out=gldv2(tmp_path, images))
    train, labels = read_list(tmp_path / "train_list.txt", root=tmp_path, num_classes=len(SIZES))
    val, val_labels = read_list(tmp_path / "val_list.txt", root=tmp_path, num_classes=len(SIZES))
    assert all(map(os.path.isfile, train + val))
    assert len({*train, *val}) == sum(SIZES)
    assert set(labels.tolist()) == set(range(len(SIZES)))
    several = {label for label, (_, ids) in enumerate(sorted(images.items())) if len(ids) > 1}
    assert set(val_labels.tolist()) == several


def test_the_full_table_gives_the_same_lists_whatever_its_order_and_columns(tmp_path):
    images = landmarks_of(SIZES)
    gldv2(tmp_path, images)
    rows = [(i, f'http://x/{i}, "a".jpg', f"{k:0{int(i[0], 16)}d}") for k, ids in images.items() for i in ids]
    random.Random(3).shuffle(rows)
    table = io.StringIO()
    writer = csv.writer(table)  # CRLF
    writer.writerows([("landmark_id", "url", "id"), *((k, url, i) for i, url, k in rows)])
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + table.getvalue().encode())
    out = tmp_path / "out"
    make_lists(out=out, csv=tmp_path / "train.csv", images=tmp_path / "train")
    expected = slow_lists(images)
    expected |= {n: expected[n].replace(b"train/", f"{tmp_path}/train/".encode()) for n in LISTS[:2]}
    assert written(out) == expected


def test_file_system_order_changes_nothing(tmp_path, monkeypatch):
    images = landmarks_of(SIZES)
    first, second = gldv2(tmp_path / "a", images), gldv2(tmp_path / "b", dict(reversed(images.items())))
    make_lists(out=first)
    scandir, walk = os.scandir, os.walk

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        __enter__ = lambda self: iter(self.entries)  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(list_selection.os, "scandir", Backwards)
    make_lists(out=second)
    assert written(first) == written(second)
    monkeypatch.setattr(list_selection.os, "scandir", scandir)
    make_lists(out=tmp_path / "c", tree=first)
    monkeypatch.setattr(
        os, "walk", lambda *a, **k: ((d, dirs.reverse() or dirs, files[::-1]) for d, dirs, files in walk(*a, **k))
    )
    make_lists(out=tmp_path / "d", tree=first)
    assert written(tmp_path / "c") == written(tmp_path / "d")


def test_images_that_go_leave_other_landmarks_where_they_are(tmp_path):
    images = landmarks_of([40] * 6)
    make_lists(out=gldv2(tmp_path / "a", images))
    gone, thinned = list(images)[:2]
    fewer = {k: ids for k, ids in images.items() if k != gone} | {thinned: images[thinned][1:]}
    make_lists(out=gldv2(tmp_path / "b", fewer))
    before, after = (
        set(re.findall(r"[0-9a-f]{16}", (tmp_path / name / "val_list.txt").read_text())) for name in ("a", "b")
    )
    assert len(before) == 48
    assert {i for i in before if i not in images[gone] + images[thinned]} == after - set(images[thinned])
    assert len((before ^ after) & set(images[thinned])) <= 2


def test_exclusions_by_image_and_landmark(tmp_path, capsys):
    images = landmarks_of([3, 5, 1, 6, 2])
    out = gldv2(tmp_path, images)
    a, b, c, d, e = images
    text = f"\ufeff# overlap with ROxford\r\n{b:08d}   # the whole landmark\n\n{images[d][2]}\n{images[d][0]}\t#x\n"
    text += f"{images[c][0]}\n0\n  # no entry: 17\nffffffffffffffff\n"
    (tmp_path / "exclude.txt").write_bytes(text.encode())
    make_lists(out=out, exclude=tmp_path / "exclude.txt")
    assert written(out) == slow_lists({a: images[a], d: [images[d][i] for i in (1, 3, 4, 5)], e: images[e]})
    said = capsys.readouterr()
    assert said.err == (
        f"note: 2 of 6 entries name no listed image or class, the first is '0' ({tmp_path}/exclude.txt, line 7)\n"
    )
    assert "8 images excluded, 0 missing, 2 whole classes" in said.out
    assert "MODEL.NUM_CLASSES 3 " in said.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"1\n3e\n", "line 2: '3e' is neither"),
        (b"0123456789ABCDEF\n", "line 1: '0123456789ABCDEF' is neither"),
        (b"1\n\n\xff\n", "line 3: not UTF-8"),
        (b"1 2\n", "line 1: '1 2' is neither"),
    ],
)
def test_a_bad_exclusion_is_named(tmp_path, capsys, text, said):
    out = gldv2(tmp_path, {1: ["0123456789abcdef"], 2: ["0123456789abcdee"]})
    (tmp_path / "x.txt").write_bytes(text)
    assert refusal(capsys, "--out", out, "--exclude", tmp_path / "x.txt").startswith(f"{tmp_path}/x.txt, {said}")


def test_excluding_everything_is_refused(tmp_path, capsys):
    out = gldv2(tmp_path, {7: ["0123456789abcdef"]})
    (tmp_path / "x.txt").write_text("7")
    assert (
        refusal(capsys, "--out", out, "--exclude", tmp_path / "x.txt") == f"{tmp_path}/x.txt: all images are excluded"
    )
    assert "absent.txt: the exclusions cannot" in refusal(capsys, "--out", out, "--exclude", tmp_path / "absent.txt")


def test_missing_images_stop_the_command_or_are_left_out(tmp_path, capsys):
    images = landmarks_of([4, 1, 6])
    out = gldv2(tmp_path, images)
    a, b, c = images
    gone = [place(tmp_path / "train", i) for i in (images[a][1], images[b][0])]
    for path in gone:
        path.unlink()
    gone[0].mkdir()  # a folder of that name is no image
    gone[1].symlink_to(tmp_path / "nowhere")
    line = {gone[0]: 2, gone[1]: 3}
    first = min(gone)
    for allowed in ([], ["--allow-missing", 1]):
        said = refusal(capsys, "--out", out, *allowed)
        assert said.startswith(
            f"{out}/train_clean.csv, line {line[first]}: no such image: {first} (2 of 11 images missing"
        )
        assert written(out) == {}
        assert (out / "missing.txt").read_text() == "".join(f"{path}\n" for path in sorted(gone))
    main(["--out", str(out), "--allow-missing", "2"])
    assert written(out) == slow_lists({a: [images[a][i] for i in (0, 2, 3)], c: images[c]})
    assert "0 images excluded, 2 missing, 1 whole classes" in capsys.readouterr().out
    assert (out / "missing.txt").exists()
    for path in gone:
        path.rmdir() if path.is_dir() else path.unlink()
        touch(path)
    main(["--out", str(out), "--force"])
    assert written(out) == slow_lists(images)
    assert not (out / "missing.txt").exists()


def test_a_wrong_folder_is_told_even_if_all_may_be_missing(tmp_path, capsys):
    out = gldv2(tmp_path, landmarks_of([3]))
    said = refusal(capsys, "--out", out, "--images", tmp_path, "--allow-missing", 100)
    assert "(3 of 3 images missing" in said and "--images" in said


# ----------------------------------------------------------------------------------------------- broken tables

ID, ID2 = "00000000000000ab", "00000000000000ac"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "line 1: the columns are ''; expected landmark_id,images"),
        (b"id,url\nx,y\n", "line 1: the columns are 'id,url'; expected"),
        (b"id,landmark_id,images\n", "line 1: the columns are"),
        (b"id,id,landmark_id\n", "line 1: the columns are"),
        (b"landmark_id,images\n", "no images in it"),
        (f"landmark_id,images\n1,{ID}\n2\n".encode(), "line 3: 1 fields, but the header has 2"),
        (f"landmark_id,images\n1,{ID},\n".encode(), "line 2: 3 fields"),
        (f"landmark_id,images\n\n1,{ID}\n2, \n".encode(), "line 4: landmark 2 has no images"),
        (f"landmark_id,images\n1,{ID} {ID[:-1]}\n".encode(), "line 2: '00000000000000a' is not an image id"),
        (f"landmark_id,images\n1,{ID.upper()}\n".encode(), "line 2: '00000000000000AB' is not an image id"),
        (f"landmark_id,images\n1,{ID[:3]}../../etc/\n".encode(), "line 2: '000../../etc/' is not an image id"),
        (b"landmark_id,images\n1," + b"x" * 200_000, "line 2: '" + "x" * 100 + "' is not an image id"),
        (b"id,landmark_id\n%b," % ID.encode() + b"1" * 9999, "line 2: '" + "1" * 100 + "' is not a landmark id"),
        (b"landmark_id,images\n1,\xff\n", "line 2: '\\udcff' is not an image id"),
        (f"landmark_id,images\n-1,{ID}\n".encode(), "line 2: '-1' is not a landmark id"),
        ("landmark_id,images\n\u0661,{ID}\n".replace("{ID}", ID).encode(), "line 2: '\\u0661' is not a landmark id"),
        (f"landmark_id,images\n{'9' * 16},{ID}\n".encode(), "line 2: '9999999999999999' is not a landmark id"),
        (f"id,url,landmark_id\n{ID},u,\n".encode(), "line 2: '' is not a landmark id"),
        (f'id,url,landmark_id\n{ID2},"a\nb",1\n{ID},"u,1\n'.encode(), "line 4: not a CSV (unexpected end of data)"),
        (
            f"landmark_id,images\n9,{ID2}\n4,{ID}\n3,{ID2} {ID}\n".encode(),
            "line 4: 0/0/0/00000000000000ab.jpg is listed for '4' and '3', first in line 3 (2 images in all)",
        ),
        (f"landmark_id,images\n9,{ID} {ID}\n".encode(), "line 2: 0/0/0/00000000000000ab.jpg is listed twice for '9'"),
        (b"path,label\na.jpg,\n", "line 2: the label is empty"),
        (b"path,label\n,a\n", "line 2: the path is empty"),
        (b"path,label\n\xe9.jpg,a\n", "line 2: the path '\\udce9.jpg' is not UTF-8 text"),
        (b"path,label\na.jpg,1\n./a.jpg,2\n", "line 3: a.jpg is listed for '1' and '2', first in line 2"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, capsys, text, said):
    (tmp_path / "t.csv").write_bytes(text)
    line = refusal(capsys, "--csv", tmp_path / "t.csv", "--out", tmp_path / "out")
    assert line.removeprefix(f"{tmp_path}/t.csv").lstrip(",: ").startswith(said)
    assert not (tmp_path / "out").exists()


def test_no_table_and_wrong_options(tmp_path, capsys):
    assert refusal(capsys, "--out", tmp_path).startswith(f"{tmp_path}/train_clean.csv: no such table; give one")
    assert "cannot be read" in refusal(capsys, "--csv", tmp_path)
    assert refusal(capsys, "--val", "1").startswith("--val 1.0: ")
    assert refusal(capsys, "--val", "nan").startswith("--val nan: ")
    assert refusal(capsys, "--allow-missing", "-1").startswith("--allow-missing -1: ")
    assert refusal(capsys, "--tree", "a", "--images", "b").startswith("--images goes with --csv")


def test_a_landmark_of_many_images_is_read_and_the_csv_module_left_as_it_was(tmp_path):
    images = landmarks_of([9000])  # 153,000 characters; the csv module's usual limit is 131,072
    (tmp_path / "t.csv").write_text(clean_csv(images))
    assert len(read_csv(tmp_path / "t.csv").paths) == 9000
    (tmp_path / "t.csv").write_text("landmark_id,images\n1,x\n")
    with pytest.raises(SourceError, match="'x' is not an image id"):
        read_csv(tmp_path / "t.csv")
    assert csv.field_size_limit() == 131072


# -------------------------------------------------------------------------------------- other tables and folders


def test_a_table_of_paths_and_labels(tmp_path):
    elsewhere = tmp_path / "else where" / "z.jpg"
    paths = ["b c/1.jpg", "b c//2.jpg", "é, ü.png", str(elsewhere)]
    for path in paths:
        touch(tmp_path / "in" / path)
    table = io.StringIO()
    csv.writer(table).writerows([("label", "note", "path"), *zip(["x, y", " 10", "9 ", "x, y"], "nnnn", paths)])  # noqa: B905
    (tmp_path / "in" / "t.csv").write_text(table.getvalue(), encoding="utf-8")
    make_lists(csv=tmp_path / "in" / "t.csv", out=tmp_path / "in", val=0)
    content = (tmp_path / "in/train_list.txt").read_text(encoding="utf-8")
    assert content == f"b c/2.jpg 0\né, ü.png 1\n{elsewhere} 2\nb c/1.jpg 2\n"
    assert (tmp_path / "in/labels.csv").read_text() == 'label,class,images\n0,10,1\n1,9,1\n2,"x, y",2\n'
    assert not (tmp_path / "in/val_list.txt").exists()


def test_whole_numbers_as_labels_keep_their_order(tmp_path):
    rows = "".join(f"{i:02d}.jpg,{i}\n" for i in range(12))
    (tmp_path / "t.csv").write_text("path,label\n" + rows)
    for i in range(12):
        touch(tmp_path / f"{i:02d}.jpg")
    make_lists(csv=tmp_path / "t.csv", out=tmp_path)
    assert (tmp_path / "train_list.txt").read_text() == "".join(f"{i:02d}.jpg {i}\n" for i in range(12))


def test_a_folder_per_class(tmp_path, capsys):
    names = ("b/1.jpg", "b/2.JPEG", "a/x y.png", "a/deep/3.webp", "b/notes.txt")
    for name in (*names, "b/._1.jpg", ".git/x/4.jpg", "@eaDir/6.jpg"):
        touch(tmp_path / "root" / name)
    (tmp_path / "c").mkdir()
    touch(tmp_path / "c/5.tif")
    (tmp_path / "root/c").symlink_to(tmp_path / "c")
    make_lists(tree=tmp_path / "root", out=tmp_path / "lists", val=0)
    root = tmp_path / "root"
    assert (tmp_path / "lists/train_list.txt").read_text().splitlines() == [
        f"{root}/{line}" for line in ("a/x y.png 0", "a/deep/3.webp 1", "b/1.jpg 2", "b/2.JPEG 2", "c/5.tif 3")
    ]
    assert (tmp_path / "lists/labels.csv").read_text() == "label,class,images\n0,a,1\n1,a/deep,1\n2,b,2\n3,c,1\n"
    assert capsys.readouterr().err == (
        f"note: 1 files below {root} are no images, the first is 'b/notes.txt'\n"
        f"note: 3 hidden or system files and folders in {root} are left out, the first is '.git'\n"
    )
    listed = (tmp_path / "lists/train_list.txt").read_text().splitlines()
    described = named_images(root)[0].names  # extraction and training lists agree
    assert [f"{root}/{name}" for name in described] == sorted(line.rpartition(" ")[0] for line in listed)
    (tmp_path / "x.txt").write_text("a/deep\nb/2.JPEG\na/x y.png  # a path with a blank\n")
    make_lists(tree=root, out=tmp_path / "lists", val=0, exclude=tmp_path / "x.txt", force=True)
    assert (tmp_path / "lists/train_list.txt").read_text() == f"{root}/b/1.jpg 0\n{root}/c/5.tif 1\n"


def test_trees_that_are_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    root = tmp_path / "root"
    assert "cannot be listed" in refusal(capsys, "--tree", root, *out)
    touch(root / "a/notes.txt")
    assert refusal(capsys, "--tree", root, *out).startswith(f"{root}: no images below this folder")
    touch(root / "a/1.jpg")
    (root / "a/loop").symlink_to(root)
    assert refusal(capsys, "--tree", root, *out).startswith(f"{root}/a/loop: the same folder as {root}; ")
    (root / "a/loop").unlink()
    touch(root / "2.jpg")
    assert refusal(capsys, "--tree", root, *out).startswith(f"{root}/2.jpg: an image in no class folder")
    (root / "2.jpg").unlink()
    Path(os.fsdecode(bytes(root / "a") + b"/\xff.jpg")).touch()
    assert "is not UTF-8 text; rename it" in refusal(capsys, "--tree", root, *out)


@pytest.mark.parametrize("name", ["a\nb.jpg", "a b.jpg ", "c.jpg\u3000"])
def test_a_path_that_no_list_can_hold_is_refused(tmp_path, capsys, name):
    touch(tmp_path / "root" / name)
    (tmp_path / "root/t.csv").write_text(f'path,label\n"{name}",1\n', encoding="utf-8")
    said = refusal(capsys, "--csv", tmp_path / "root/t.csv", "--out", tmp_path / "out")
    assert f"t.csv, line 2: {str(tmp_path / 'root' / name)!a} cannot stand in a list" in said


def test_a_blank_or_mark_at_the_start_is_refused_only_where_a_line_would_begin_with_it(tmp_path, capsys):
    for name in (" 1.jpg", "\ufeff2.jpg"):
        touch(tmp_path / "root/train" / name)
        (tmp_path / "t.csv").write_text(f"path,label\n{name},1\n", encoding="utf-8")
        options = ("--csv", tmp_path / "t.csv", "--images", tmp_path / "root/train", "--val", 0)
        assert "cannot stand in a list" in refusal(capsys, *options, "--out", tmp_path / "root/train")
        main([str(option) for option in (*options, "--out", tmp_path / "root", "--force")])
        paths, _ = read_list(tmp_path / "root/train_list.txt", root=tmp_path / "root")
        assert paths == [f"{tmp_path}/root/train/{name}"]


# ---------------------------------------------------------------------------------------------------- the output


def test_images_reached_by_a_link_in_out_are_named_relative_to_it(tmp_path, monkeypatch):
    images = landmarks_of([3, 2])
    gldv2(tmp_path / "disk", images)
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make_lists(out=tmp_path / "out", images=tmp_path / "disk/train")
    assert written(tmp_path / "out") == slow_lists(images)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train").symlink_to(tmp_path / "disk/train")
    monkeypatch.chdir(tmp_path)
    make_lists(out=Path("own"), csv=Path("disk/train_clean.csv"))
    assert written(tmp_path / "own") == slow_lists(images)


def test_lists_that_differ_are_replaced_only_by_force(tmp_path, capsys):
    images = landmarks_of(SIZES)
    out = gldv2(tmp_path, images)
    main(["--out", str(out)])
    assert f"written: {', '.join(LISTS)} in {out}" in capsys.readouterr().out
    stamps = [(out / name).stat().st_mtime_ns for name in LISTS]
    main(["--out", str(out)])
    assert f"unchanged: {', '.join(LISTS)} in {out}" in capsys.readouterr().out
    assert [(out / name).stat().st_mtime_ns for name in LISTS] == stamps
    for arguments, names in (
        (["--seed", 1], "train_list.txt and val_list.txt"),
        (["--val", 0], "train_list.txt and val_"),
    ):
        before = written(out)
        assert refusal(capsys, "--out", out, *arguments).startswith(f"{out}: {names}")
        assert written(out) == before
        main(["--out", str(out), "--force", *map(str, arguments)])
    assert written(out) == slow_lists(images, share=0)
    assert "MODEL.NUM_CLASSES 13 DATA_LOADER.DATA_DIR" in (said := capsys.readouterr().out)
    assert said.count('TEST.SPLIT ""') == 1


def test_a_full_disk_leaves_the_old_lists(tmp_path, monkeypatch, capsys):
    images = landmarks_of(SIZES)
    out = gldv2(tmp_path, images)
    make_lists(out=out)
    before, names = written(out), sorted(os.listdir(out))
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "the disk")

    monkeypatch.setattr(list_output.os, "fsync", full)
    assert refusal(capsys, "--out", out, "--seed", 1, "--force") == "the disk: No space left on device"
    assert (written(out), sorted(os.listdir(out))) == (before, names)


def test_the_permissions_are_those_of_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        make_lists(out=gldv2(tmp_path, landmarks_of([5])))
    finally:
        os.umask(mask)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in LISTS} == {0o640}


def test_the_summary(tmp_path, capsys):
    make_lists(out=gldv2(tmp_path / "data set" / "landmark", landmarks_of(SIZES)))
    assert capsys.readouterr().out.splitlines()[:5] == [
        "left out    0 images excluded, 0 missing, 0 whole classes",
        "images      127, of which 27 for validation (21.3%)",
        "classes     13, of which 2 with a single image, which is for training",
        "a class has 1 to 40 images, median 5",
        f"train with  MODEL.NUM_CLASSES 13 DATA_LOADER.DATA_DIR '{tmp_path}/data set' TRAIN.DATASET landmark "
        "TEST.DATASET landmark",
    ]


def labelled(file: Path) -> dict[str, int]:
    lines = (line.rsplit(" ", 1) for line in file.read_text().splitlines())
    return {path: int(label) for path, label in lines}


def test_unseen_classes_are_in_no_list_of_training(tmp_path, capsys):
    images = landmarks_of(SIZES)
    out = gldv2(tmp_path / "landmark", images)
    make_lists(out=out)
    seen_all = written(out)
    make_lists(out=out, unseen=0.3, force=True)
    printed = capsys.readouterr().out
    train, val, unseen = (labelled(out / f"{name}_list.txt") for name in ("train", "val", "unseen"))
    landmark_of = {f"train/{i[0]}/{i[1]}/{i[2]}/{i}.jpg": k for k, ids in images.items() for i in ids}
    assert sorted([*train, *val, *unseen]) == sorted(landmark_of)
    kept_from = {landmark_of[path] for path in unseen}
    assert len(kept_from) == 3 and all(len(images[k]) > 1 for k in kept_from)  # of the eleven that have two images
    assert not kept_from & {landmark_of[path] for path in (*train, *val)}
    trained = sorted(set(images) - kept_from)
    number = {k: label for label, k in enumerate([*trained, *sorted(kept_from)])}
    assert {**train, **val, **unseen} == {path: number[k] for path, k in landmark_of.items()}
    rows = [f"{label},{k},{len(images[k])}" for k, label in sorted(number.items(), key=lambda item: item[1])]
    assert (out / "labels.csv").read_text().splitlines()[1:] == rows
    assert (
        f"MODEL.NUM_CLASSES {len(trained)} " in printed
        and f"unseen      3 classes with {len(unseen)} images" in printed
    )
    assert "INFER.IMAGES" in printed
    # The validation images of the other landmarks are those drawn without it.
    of_before = {line.split()[0] for line in seen_all["val_list.txt"].decode().splitlines()}
    assert set(val) == {path for path in of_before if landmark_of[path] not in kept_from}
    make_lists(out=out, force=True)
    assert written(out) == seen_all and not (out / "unseen_list.txt").exists()


def test_unseen_classes_that_go_leave_the_others_where_they_are(tmp_path):
    images = landmarks_of([4] * 40, seed=3)

    def drawn(folder: str, which: dict) -> set[int]:
        out = gldv2(tmp_path / folder, which)
        make_lists(out=out, unseen=0.25)
        ids = {Path(path).stem for path in labelled(out / "unseen_list.txt")}
        return {k for k, own in which.items() if set(own) <= ids}

    everything = drawn("all", images)
    fewer = {k: ids for k, ids in images.items() if k not in list(images)[:4]}
    assert len(everything) == 10 and len(everything & fewer.keys() - drawn("fewer", fewer)) <= 1


@pytest.mark.parametrize(
    ("share", "sizes", "said"), [(1, [2, 2], "below 1"), (-0.1, [2, 2], "at least 0"), (0.5, [9, 1], "two classes")]
)
def test_shares_of_unseen_classes_that_cannot_be(tmp_path, capsys, share, sizes, said):
    assert said in refusal(capsys, "--out", gldv2(tmp_path, landmarks_of(sizes)), "--unseen", share)


def test_the_command_as_a_process(tmp_path):
    images = landmarks_of(SIZES)
    gldv2(tmp_path / "datasets/data/landmark", images)
    done = python(ROOT / "datasets/gldv2.py", cwd=tmp_path)  # all defaults
    assert (done.returncode, done.stderr) == (0, "")
    assert "train with  MODEL.NUM_CLASSES 13 DATA_LOADER.DATA_DIR datasets/data TRAIN.DATASET landmark" in done.stdout
    assert written(tmp_path / "datasets/data/landmark") == slow_lists(images)
    done = python(ROOT / "datasets/gldv2.py", "--csv", "absent.csv", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.csv: no such table; give one with --csv, or a folder per class with --tree\n"
