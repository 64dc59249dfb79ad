"""Download ROxford5k, RParis6k and the million distractors: archive by archive, each fetched and unpacked once.

DATA_DIR/<set>/ holds the list of the images (gnd_roxford5k.pkl, revisitop1m.txt), the images in jpg/, an archive until
it is unpacked, and unpacked.json, the archives that have been.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.base.arguments import Parser
from core.base.download import download
from core.base.errors import UserError, entry_point
from core.base.files import atomic_write
from core.base.locks import InUse, folder_lock
from core.base.version import ROOT
from datasets.missing import missing_files
from evaler.sources.unpack import EXTENSIONS, Wanted, unpack
from revisitop import groundtruth

DEFAULT_SETS = ("roxford5k", "rparis6k")
# Mirrors: each may be given in the environment.
BASE_URLS = {
    "ROXFORD_BASE_URL": "https://www.robots.ox.ac.uk/~vgg/data/oxbuildings",
    "RPARIS_BASE_URL": "https://www.robots.ox.ac.uk/~vgg/data/parisbuildings",
    "GROUNDTRUTH_BASE_URL": "http://cmp.felk.cvut.cz/revisitop/data/datasets",
    "REVISITOP1M_BASE_URL": "http://ptak.felk.cvut.cz/revisitop/revisitop1m",
}


@dataclass(frozen=True)
class RetrievalSet:
    """Where a set comes from: the list of its images (a ground truth, or a name a line), and the archives."""

    name: str
    list_url: str
    archive_urls: tuple[str, ...]
    images: int  # that the list names, queries included
    sha256: str | None = None  # of the list


def known_sets(environment: Mapping[str, str]) -> dict[str, RetrievalSet]:
    """By name; `environment` may name mirrors (`BASE_URLS`)."""
    base = {key: environment.get(key, url).rstrip("/") for key, url in BASE_URLS.items()}
    truth = base["GROUNDTRUTH_BASE_URL"]
    sets = (
        RetrievalSet(
            "roxford5k",
            f"{truth}/roxford5k/gnd_roxford5k.pkl",
            (f"{base['ROXFORD_BASE_URL']}/oxbuild_images-v1.tgz",),
            images=4993 + 70,
            sha256=groundtruth.OFFICIAL_SHA256["roxford5k"],
        ),
        RetrievalSet(
            "rparis6k",
            f"{truth}/rparis6k/gnd_rparis6k.pkl",
            tuple(f"{base['RPARIS_BASE_URL']}/paris_{part}-v1.tgz" for part in (1, 2)),
            images=6322 + 70,
            sha256=groundtruth.OFFICIAL_SHA256["rparis6k"],
        ),
        distractors(base["REVISITOP1M_BASE_URL"]),
    )
    return {entry.name: entry for entry in sets}


def distractors(base_url: str, *, archives: int = 100, images: int = 1_001_001) -> RetrievalSet:
    urls = tuple(f"{base_url}/jpg/revisitop1m.{number}.tar.gz" for number in range(1, archives + 1))
    return RetrievalSet("revisitop1m", f"{base_url}/revisitop1m.txt", urls, images)


def fetch_set(entry: RetrievalSet, data_dir: str | os.PathLike, *, keep_archives: bool = False) -> list[str]:
    """Download and unpack what is not there of DATA_DIR/<name>; return the names of the images that are missing then.

    A set whose images are all there is not fetched. An archive that is unpacked is noted in `unpacked.json`, then
    deleted unless `keep_archives`; one that lies in the folder already is used. Only images that the list names are
    unpacked, to `jpg/<name>`. Members may lie in any folder of an archive (RParis6k's do, and are flattened): a
    member's path is looked up in the list, else its last part, where that is unique. What revisitop1m.txt holds is
    taken to be paths below jpg/, as those who read it elsewhere take it; either way of packing fits.

    Raises `UserError` in one line: for a download that fails (run again to go on), another checksum or count, a list
    with a name that leads out of the folder, a damaged archive, a folder that another process works on.
    """
    folder = Path(data_dir) / entry.name
    try:
        with folder_lock(folder):
            return _fetch(entry, folder, keep_archives)
    except InUse:
        raise UserError(f"{folder} is being downloaded by another process: wait for its end") from None


def _fetch(entry: RetrievalSet, folder: Path, keep_archives: bool) -> list[str]:
    for rest in folder.glob(".*.tmp"):  # of `atomic_write` in a process that was killed
        rest.unlink()
    list_file = folder / _file_name(entry.list_url)
    download(entry.list_url, list_file, sha256=entry.sha256)
    names = read_names(list_file)
    if len(names) != entry.images:
        raise UserError(
            f"{list_file}: names {len(names)} images, {entry.name} has {entry.images}; delete it to download it again"
        )
    complete = not _missing(names, folder)
    wanted = Wanted(names)
    state_file = folder / "unpacked.json"
    unpacked = _read_state(state_file)
    for number, url in enumerate(entry.archive_urls, start=1):
        archive = folder / _file_name(url)
        label = f"{entry.name}, archive {number} of {len(entry.archive_urls)}: {archive.name}"
        if not complete and archive.name not in unpacked:
            print(label, flush=True)
            download(url, archive)
            result = unpack(archive, folder / "jpg", wanted)
            if result.passed_over:
                print(f"{label}: {result.passed_over} members were not unpacked; {result.first}", flush=True)
            print(f"{label}: {result.images} images, {result.kept} of them were there already", flush=True)
            unpacked[archive.name] = {"images": result.images, "bytes": archive.stat().st_size}
            with atomic_write(state_file) as file:
                file.write(json.dumps(unpacked, indent=1).encode())
        if not keep_archives:
            archive.unlink(missing_ok=True)
    return _missing(names, folder)


def read_names(list_file: Path) -> list[str]:
    """The images that a ground truth (.pkl) or a list of one a line names, as paths below jpg. Raises `UserError`."""
    if list_file.suffix == ".pkl":
        truth = groundtruth.load(list_file)  # which has checked the names
        return list(dict.fromkeys(f"{name}.jpg" for name in truth.imlist + truth.qimlist))
    names = list_file.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    names = [name.removesuffix("\r") for name in names[: -1 if names[-1] == "" else None]]
    for number, name in enumerate(names, start=1):
        parts = name.split("/")
        if not name.isprintable() or not name.lower().endswith(EXTENSIONS) or {"", ".", ".."} & set(parts):
            raise UserError(f"{list_file}, line {number}: {name[:80]!a} cannot be the path of an image below jpg")
    if len(set(names)) != len(names):
        raise UserError(f"{list_file}: names some images twice; delete it to download it again")
    return names


def _missing(names: list[str], folder: Path) -> list[str]:
    absent = missing_files([f"{folder}/jpg/{name}" for name in names])
    return [names[index] for index in absent.nonzero()[0]]


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


def _read_state(path: Path) -> dict:
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a list of unpacked archives; delete it to download all of them again")
    return state


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="download_revisitop.sh",
        description="Download retrieval sets and check that they are complete; run again to go on after a break.",
        epilog=f"Mirrors may be named in the environment: {' '.join(BASE_URLS)}.",
    )
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help="roxford5k, rparis6k (default: both), revisitop1m (hundreds of GB)"
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets" / "data", help="default: datasets/data")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete an archive that is unpacked")
    args = parser.parse_intermixed_args(argv)
    known = known_sets(os.environ)
    chosen = list(dict.fromkeys(args.sets or DEFAULT_SETS))
    for name in chosen:  # before anything is downloaded
        if name not in known:
            raise UserError(f"unknown set {name}; known are {' '.join(known)}")
    fetch_all([known[name] for name in chosen], args.data_dir, keep_archives=args.keep_archives)


def fetch_all(entries: list[RetrievalSet], data_dir: Path, *, keep_archives: bool = False) -> None:
    """Fetch the sets and print what was found of each. Raises `UserError` in the end if images are missing."""
    incomplete = []
    for entry in entries:
        missing = fetch_set(entry, data_dir, keep_archives=keep_archives)
        list_name = _file_name(entry.list_url)
        print(f"{entry.name}: found {entry.images - len(missing)} of {entry.images} images of {list_name}", flush=True)
        if missing:
            incomplete.append(
                f"{entry.name}: {len(missing)} of {entry.images} images are missing, the first is {missing[0]}; delete "
                f"{Path(data_dir) / entry.name / 'unpacked.json'} to download all its archives again"
            )
    if incomplete:
        raise UserError("; ".join(incomplete))
