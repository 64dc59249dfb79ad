"""From chunks to one collection: complete, in the order of the list, or not at all."""

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from core.arguments import load_cfg_from_args
from core.base.errors import UserError, entry_point
from core.base.locks import folder_lock
from core.processes.progress import progress
from evaler.extraction.chunks import Plan, name_lines, plans, present, read_chunk, read_header, read_plan
from evaler.features.exports import export
from evaler.features.store import Features, FeaturesError, read_manifest, some, write


def missing(folder: Path, plan: Plan) -> list[int]:
    """The numbers of the chunks that are not there yet."""
    there = present(folder)
    return [number for number in range(plan.chunks) if number not in there]


def join(parent: Path, plan: Plan) -> None:
    """Write the collection of a plan into `parent`, the folder of its set, and remove its chunks.

    Every chunk is read and checked, and the names must be those of the list in its order. Raises `FeaturesError` that
    names a chunk which is missing, damaged or of another extraction, and `InUse` while a shard is at work.
    """
    folder = plan.folder(parent)
    with folder_lock(folder):
        absent = missing(folder, plan)
        if absent:
            with contextlib.suppress(OSError):  # one that holds nothing: the lock has made it, where another has joined
                folder.rmdir()
            raise FeaturesError(
                f"{folder}: chunk {some(absent)} of {plan.chunks} missing; run the extraction again to complete it"
            )
        headers = [read_header(folder, plan, number) for number in range(plan.chunks)]
        dims = {header["dim"] for header in headers}
        if len(dims) > 1:
            raise FeaturesError(f"{folder}: chunks of dimensions {dims}; delete the folder and extract again")
        count = sum(header["count"] for header in headers)
        write(parent, plan.collection, _parts(folder, plan), count=count, dim=dims.pop(), dtype=plan.dtype)
        discard(folder)


def discard(folder: Path) -> None:
    """Remove the chunks of a collection that is joined, whatever is left of them.

    What cannot be removed stays for the next run: network file systems keep a file that another process still reads.
    """
    joined = folder.with_name(folder.name.replace(".chunks-", ".joined-"))
    shutil.rmtree(joined, ignore_errors=True)  # of an earlier one that ended here
    try:
        folder.rename(joined)  # first, or a half of them would look like an extraction that is not finished
    except FileNotFoundError:
        return
    except OSError as error:
        print(f"note: {folder} is not needed any more, but cannot be removed: {error.strerror}", file=sys.stderr)
    else:
        shutil.rmtree(joined, ignore_errors=True)


def _parts(folder: Path, plan: Plan) -> Iterator[Features]:
    digest = hashlib.sha256()
    for number in progress(range(plan.chunks), f"joining {plan.collection}", unit="chunk", leave=False):
        part = read_chunk(folder, plan, number)
        digest.update(name_lines(_in_order(part, plan.rows(number))))
        yield part
    # All of it is written by now, but under temporary names: an error here still leaves nothing.
    if digest.hexdigest() != plan.names_sha256:
        raise FeaturesError(f"{folder}: the chunks do not hold the list's names; delete the folder and extract again")


def _in_order(part: Features, rows: range) -> list[str]:
    """The names of all images of a chunk, those rejected too, in the order of the list."""
    described = iter(part.names)
    rejected = {rejection.index: rejection.name for rejection in part.rejected}
    return [rejected[index] if index in rejected else next(described) for index in rows]


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Join what shards have left in OUT_DIR; a shard that finds all chunks there has done so already."""
    cfg = load_cfg_from_args("Join the chunks of an extraction whose shards ran apart.", argv)
    root = Path(cfg.OUT_DIR) / "features"
    folders = [folder for parent in sorted(root.glob("*")) if parent.is_dir() for folder in plans(parent)]
    if not folders and not any(root.glob("*/*.json")):
        raise UserError(f"{root}: nothing to join and nothing joined; extract with evaler/infer.py first")
    found = [(folder, read_plan(folder)) for folder in folders]
    keys = [(folder.parent, plan.collection) for folder, plan in found]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled:
        which = some([folder.name for folder, key in zip(folders, keys, strict=True) if key == doubled])
        raise FeaturesError(f"{doubled[0]}: '{doubled[1]}' was extracted in several ways ({which}); delete all but one")
    for folder, plan in found:
        join(folder.parent, plan)
    for path in sorted(root.glob("*/*.json")):
        manifest = read_manifest(path.parent, path.stem)
        export(path.parent, path.stem, cfg.INFER.EXPORT)
        count, rejected = manifest["count"], len(manifest["rejected"])
        print(f"{path.parent.name} {path.stem}: {count} descriptors, {rejected} images rejected")
