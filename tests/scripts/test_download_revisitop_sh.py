"""download_revisitop.sh against a local server, with the real interpreter and the official ground truth."""

import gzip
import io
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from revisitop import groundtruth

ROOT = Path(__file__).resolve().parents[2]
OXFORD = "/oxford/oxbuild_images-v1.tgz"
PARIS = ("/paris/paris_1-v1.tgz", "/paris/paris_2-v1.tgz")


@pytest.fixture
def downloader(sandbox, file_server):
    """The sandbox with the real interpreter and code, and a server in place of the published addresses."""
    for package in ("core", "datasets", "evaler", "revisitop"):
        shutil.copytree(ROOT / package, sandbox.root / package, ignore=shutil.ignore_patterns("data"))
    sandbox.env |= {
        "PYTHON": sys.executable,
        "no_proxy": "127.0.0.1",
        "ROXFORD_BASE_URL": f"{file_server.url}/oxford",
        "RPARIS_BASE_URL": f"{file_server.url}/paris",
        "GROUNDTRUTH_BASE_URL": f"{file_server.url}/truth",
        "REVISITOP1M_BASE_URL": f"{file_server.url}/million",
    }
    return sandbox


def tar_gz(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return gzip.compress(buffer.getvalue(), 1)


def test_both_sets_by_default(downloader, file_server, shared):
    """Archives as published: Oxford's images at the top, Paris's in folders, in two parts; here most are lacking."""
    images = {}
    for name in ("roxford5k", "rparis6k"):
        truth = shared / "revisitop" / f"gnd_{name}.pkl"
        file_server.files[f"/truth/{name}/gnd_{name}.pkl"] = truth.read_bytes()
        gnd = groundtruth.load(truth)
        images[name] = [f"{image}.jpg" for image in gnd.imlist + gnd.qimlist]
    paris = [f"paris/{image.split('_')[1]}/{image}" for image in images["rparis6k"]]
    file_server.files[OXFORD] = tar_gz(images["roxford5k"][:100])
    file_server.files[PARIS[0]] = tar_gz([*paris[:50], "paris/a/paris_not_listed_000000.jpg"])
    file_server.files[PARIS[1]] = tar_gz(paris[51:90])
    data = downloader.root / "datasets/data"
    result = downloader.run("download_revisitop.sh")
    assert result.returncode == 2
    assert "roxford5k: found 100 of 5063 images of gnd_roxford5k.pkl\n" in result.stdout
    assert "rparis6k: found 89 of 6392 images of gnd_rparis6k.pkl\n" in result.stdout
    line = result.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: roxford5k: 4963 of 5063 images are missing, the first is {images['roxford5k'][100]}; "
    )
    assert f"; rparis6k: 6303 of 6392 images are missing, the first is {images['rparis6k'][50]}; delete " in line
    assert sorted(path.name for path in (data / "roxford5k/jpg").iterdir()) == sorted(images["roxford5k"][:100])
    assert (data / "roxford5k/jpg" / images["roxford5k"][0]).read_text() == images["roxford5k"][0]
    assert len(list((data / "rparis6k/jpg").iterdir())) == 89
    assert {path.name for path in (data / "rparis6k").iterdir()} == {"gnd_rparis6k.pkl", "jpg", "unpacked.json"}

    # A mended archive is fetched when its mark is gone, and those of the other set are not.
    file_server.files[PARIS[1]] = tar_gz(paris[50:90])
    file_server.asked.clear()
    (data / "rparis6k/unpacked.json").unlink()
    result = downloader.run("download_revisitop.sh")
    assert file_server.asked == [(PARIS[0], None), (PARIS[1], None)]
    assert "paris_2-v1.tgz: 40 images, 39 of them were there already\n" in result.stdout
    assert "rparis6k: found 90 of 6392 images of gnd_rparis6k.pkl\n" in result.stdout


def test_a_complete_set_is_code_0(downloader, file_server, shared, tmp_path):
    truth = shared / "revisitop/gnd_roxford5k.pkl"
    folder = tmp_path / "data/roxford5k"
    folder.mkdir(parents=True)
    shutil.copy(truth, folder)
    (folder / "jpg").symlink_to(tmp_path / "disk")  # a link to another disk
    (tmp_path / "disk").mkdir()
    gnd = groundtruth.load(truth)
    first, *others = [f"{image}.jpg" for image in gnd.imlist + gnd.qimlist]
    (tmp_path / "disk" / others[0]).touch()
    for image in others[1:]:  # links, since files take long to make
        (tmp_path / "disk" / image).hardlink_to(tmp_path / "disk" / others[0])
    file_server.files[OXFORD] = tar_gz([first])
    result = downloader.run("download_revisitop.sh", "--data-dir", str(tmp_path / "data"), "roxford5k")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("roxford5k: found 5063 of 5063 images of gnd_roxford5k.pkl\n")
    assert (tmp_path / "disk" / first).read_text() == first and (folder / "jpg").is_symlink()


def test_options_and_names_in_any_order(downloader, file_server, tmp_path):
    file_server.files["/truth/roxford5k/gnd_roxford5k.pkl"] = b"another file"
    result = downloader.run("download_revisitop.sh", "--keep-archives", "roxford5k", "--data-dir", "here", "rparis6k")
    url = f"{file_server.url}/truth/roxford5k/gnd_roxford5k.pkl"
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {url}: the sha256 is ")
    assert [path.name for path in downloader.elsewhere.iterdir()] == ["here"]


def test_the_distractors_come_only_by_name_and_from_their_address(downloader, file_server):
    result = downloader.run("download_revisitop.sh", "revisitop1m")
    assert result.returncode == 2
    assert result.stderr == f"error: {file_server.url}/million/revisitop1m.txt: the server answers 404 Not Found\n"
    assert file_server.asked == [("/million/revisitop1m.txt", None)]


def test_an_unknown_name_stops_before_any_download(downloader, file_server):
    result = downloader.run("download_revisitop.sh", "roxford5k", "oxford5k")
    assert result.returncode == 2
    assert result.stderr == "error: unknown set oxford5k; known are roxford5k rparis6k revisitop1m\n"
    assert file_server.asked == []
