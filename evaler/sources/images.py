"""The images to describe: Revisited sets, distractors, and images of one's own."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from datasets.images.decode import ImageError
from datasets.images.files import EXTENSIONS, hidden_note
from evaler.sources.image_list import Box, ImageList, LooseFiles, crop, read_cropped
from evaler.sources.image_names import ARCHIVES, COMPRESSED, read_list, search
from evaler.sources.tar_files import TarFiles
from evaler.sources.tar_index import tar_index
from evaler.sources.training_list import is_training_list, read_training_list
from revisitop import groundtruth

__all__ = ["DISTRACTORS", "Box", "ImageList", "crop", "distractors", "named_images", "read_cropped", "revisited_set"]

KEY = "INFER.IMAGES"
_LOOKED_FOR = f"(looked for {' '.join(EXTENSIONS)})"
DISTRACTORS = "revisitop1m"  # the set without queries


def revisited_set(data_dir: str | os.PathLike, name: str, *, crop_query: bool) -> dict[str, ImageList]:
    """The collections `queries` and `database` of DATA_DIR/<name>; queries with their boxes if they are cropped."""
    folder = Path(data_dir) / name
    truth = groundtruth.load(groundtruth.path_of(data_dir, name))
    boxes = [query.bbx for query in truth.gnd] if crop_query else None

    def images(names: Sequence[str], boxes: list[Box | None] | None) -> ImageList:
        names = list(names)
        return ImageList(names, LooseFiles(folder / "jpg", names, suffix=".jpg"), boxes)

    return {"queries": images(truth.qimlist, boxes), "database": images(truth.imlist, None)}


def distractors(data_dir: str | os.PathLike, name: str = DISTRACTORS) -> ImageList:
    """The files DATA_DIR/<name>/jpg/... that DATA_DIR/<name>/<name>.txt lists, with their extensions, in its order.

    Raises `ImageError` for a list that is missing or cannot be used.
    """
    folder = Path(data_dir) / name
    path = folder / f"{name}.txt"
    if not path.is_file():
        raise ImageError(f"{path}: no such list; `sh scripts/download_revisitop.sh {name}` gets the set")
    names = read_list(path, key="INFER.DATASETS")
    return ImageList(names, LooseFiles(folder / "jpg", names))


def named_images(path: str | os.PathLike, *, cache_dir: Path | None = None) -> tuple[ImageList, list[str]]:
    """The images that INFER.IMAGES names, and notes on what is left out.

    - A folder: all images in it and below (by extension, `EXTENSIONS`; not what `is_hidden`), named by their paths
      relative to it, sorted as strings. Links to folders are followed, but not back into a folder they lie in.
    - A tar archive, or a folder of archives (`.tar`, not compressed): archives in sorted order, their members as they
      lie there, named by the members' paths. They are read without unpacking; the index is kept in `cache_dir`.
    - A list file: a path a line, relative to the list's folder (absolute paths are refused: names must not depend on
      where a data set lies; a link beside the list may lead elsewhere). Order is the list's, any extension will do.
    - A list file of training, `path label` a line: relative to the list's folder or absolute, as training reads it.

    Raises `ImageError` for a path, an archive or a list that cannot be used, and where no image is found.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, cache_dir)
    if not path.exists():
        raise ImageError(f"{KEY} {path}: no such folder, list file or tar archive")
    name = path.name.lower()
    if name.endswith(COMPRESSED):
        raise _compressed(path)
    if name.endswith(ARCHIVES):
        return _archives([path], path, cache_dir)
    if name.endswith(EXTENSIONS) or not path.is_file():
        raise ImageError(f"{KEY} {path}: name a folder of images, a list file or a tar archive")
    if is_training_list(path):
        names, files, _ = read_training_list(path)
        return ImageList(names, files), []
    names = read_list(path, key=KEY)
    return ImageList(names, LooseFiles(path.parent, names)), []


def _folder(folder: Path, cache_dir: Path | None) -> tuple[ImageList, list[str]]:
    content = search(folder)
    notes = [f"{circle} leads back to a folder that it lies in and is not entered" for circle in content.circles]
    hidden = [hidden_note(len(content.hidden), content.hidden[0], folder)] if content.hidden else []
    if content.archives and content.images:
        raise ImageError(
            f"{KEY} {folder}: holds images ({content.images[0]}) and archives ({content.archives[0]}); name one "
            f"of them, or a list file of the images"
        )
    if content.compressed and not content.images:  # with archives it would be a part of the set that is left out
        raise _compressed(folder / content.compressed[0])
    if content.archives:
        images, more = _archives([folder / name for name in content.archives], folder, cache_dir)
        return images, notes + hidden + more
    if not content.images:
        raise ImageError(
            f"{KEY} {folder}: {'; '.join([f'no image in it, and no .tar archive {_LOOKED_FOR}', *hidden])}"
        )
    if content.others:
        notes.append(f"{content.others} files in {folder} have no image's extension and are left out")
    return ImageList(content.images, LooseFiles(folder, content.images)), notes + hidden


def _archives(paths: list[Path], named: Path, cache_dir: Path | None) -> tuple[ImageList, list[str]]:
    digest = hashlib.sha256(b"\0".join(os.fsencode(os.path.abspath(path)) for path in paths)).hexdigest()
    index = tar_index(paths, cache_dir / f"tar-index-{digest[:16]}" if cache_dir else None)
    hidden = [archive for archive in index.archives if archive.hidden]
    notes = [hidden_note(sum(archive.hidden for archive in hidden), hidden[0].first_hidden, named)] if hidden else []
    if not index.names:
        raise ImageError(f"{KEY} {named}: {'; '.join([f'no image in the archive {_LOOKED_FOR}', *notes])}")
    links, others = (sum(getattr(archive, kind) for archive in index.archives) for kind in ("links", "others"))
    if links:
        notes.append(f"{links} images in {named} are links and left out; pack them with tar -h --hard-dereference")
    if others:
        notes.append(f"{others} members of {named} have no image's extension and are left out")
    return ImageList(index.names, TarFiles(index)), notes


def _compressed(path: Path) -> ImageError:
    return ImageError(
        f"{KEY} {path}: compressed, its members cannot be read at random; unpack it (gunzip leaves a .tar that will do)"
    )
