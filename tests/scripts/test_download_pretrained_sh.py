"""download_pretrained.sh against a local server, with the real interpreter."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def downloader(sandbox, file_server):
    """The sandbox with the real interpreter and download code, and a server in place of the published address."""
    shutil.copytree(ROOT / "core", sandbox.root / "core")
    sandbox.env |= {"PYTHON": sys.executable, "PYCLS_BASE_URL": file_server.url, "no_proxy": "127.0.0.1"}
    return sandbox


R50 = "/161235311/R-50-1x64d_dds_8gpu.pyth"
R101 = "/161167170/R-101-1x64d_dds_8gpu.pyth"


def test_weights_arrive_after_an_interrupted_download(downloader, file_server):
    file_server.files = {R50: b"five" * 50_000, R101: b"one" * 50_000}
    file_server.break_after = 70_000
    broken = downloader.run("download_pretrained.sh")
    assert broken.returncode == 2
    assert f"error: {file_server.url}{R50}: the connection ended after 70000 of 200000 bytes" in broken.stderr
    folder = downloader.root / "pretrained"
    assert not (folder / R50.split("/")[-1]).exists()

    file_server.break_after = None
    whole = downloader.run("download_pretrained.sh")
    assert whole.returncode == 0, whole.stderr
    assert file_server.asked == [(R50, None), (R50, "bytes=70000-"), (R101, None)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "R-50-1x64d_dds_8gpu.pyth": b"five" * 50_000,
        "R-101-1x64d_dds_8gpu.pyth": b"one" * 50_000,
    }
    assert downloader.run("download_pretrained.sh", "R-101").returncode == 0
    assert len(file_server.asked) == 3


def test_every_published_name_leads_to_its_file(downloader, file_server):
    published = {
        "R-50": R50,
        "R-101": R101,
        "R-152": "/161167467/R-152-1x64d_dds_8gpu.pyth",
        "X-50": "/161167411/X-50-32x4d_dds_8gpu.pyth",
        "X-101": "/161167590/X-101-32x4d_dds_8gpu.pyth",
    }
    file_server.files = {path: name.encode() for name, path in published.items()}
    assert downloader.run("download_pretrained.sh", *published).returncode == 0
    for name, path in published.items():
        assert (downloader.root / "pretrained" / path.split("/")[-1]).read_bytes() == name.encode()
    known = (ROOT / "pretrained/README.md").read_text()
    assert all(path in known for path in published.values())


def test_an_unknown_name_stops_before_any_download(downloader, file_server):
    result = downloader.run("download_pretrained.sh", "R-50", "R-18")
    assert result.returncode == 2
    assert result.stderr == "error: unknown weights R-18; known are R-50 R-101 R-152 X-50 X-101\n"
    assert file_server.asked == []
