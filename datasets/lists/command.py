"""The command that makes list files: `python datasets/gldv2.py` (entry file: gldv2.py, beside this one)."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import numpy as np

from datasets.images.files import hidden_note
from datasets.lists.output import MISSING, UNSEEN, list_files, path_prefix, write_files
from datasets.lists.selection import (
    Exclusions,
    excluded_images,
    read_exclusions,
    unseen_classes,
    validation_images,
    with_classes_last,
)
from datasets.lists.sources import Listing, SourceError, read_csv, read_tree
from datasets.missing import missing_files
from datasets.normalisation import note_on_path

OUT = Path("datasets/data/landmark")
DESCRIPTION = """\
Make the list files of a landmark set: OUT/train_list.txt and OUT/val_list.txt, one `path label` a line, and
OUT/labels.csv, which says for every label what it stands for and how many images it has.

What they are made from (--csv or --tree):
  train_clean.csv of Google Landmarks v2   columns landmark_id,images (image ids between blanks)
  train.csv of Google Landmarks v2         columns id,url,landmark_id
  a table of your own                      columns path,label; a label is any text
  a folder per class                       --tree ROOT: the class of an image is its folder's path below ROOT
Image abc... of Google Landmarks v2 is looked for at IMAGES/a/b/c/abc....jpg.

Labels are 0, 1, 2, ... in ascending order of landmark id (of your labels or folders: by value if all are whole numbers,
else alphabetically). Excluded and missing images are taken out first, so labels have no gaps: set MODEL.NUM_CLASSES to
the number of classes that is printed at the end, and keep labels.csv with the weights.

Of every class, 20 % of the images are drawn for validation, at least one if it has two; a single image is for training.
A network has seen these places: what it finds of places that are new to it is told by --unseen SHARE, which keeps that
share of the classes from training and validation. Their images stand in OUT/unseen_list.txt, with labels behind those
that are trained. Extract that list (INFER.IMAGES) and score it (evaler/evaluate_labels.py --labels).
The same input gives the same bytes on every machine."""
EXAMPLES = """\
examples:
  python datasets/gldv2.py
      the clean set: datasets/data/landmark/train_clean.csv, images in datasets/data/landmark/train
  python datasets/gldv2.py --exclude overlap.txt
      without the landmarks and images whose ids stand in overlap.txt
  python datasets/gldv2.py --csv /big/train.csv --images /big/train --out datasets/data/gldv2-all
  python datasets/gldv2.py --tree /data/photos --out datasets/data/photos --unseen 0.2
      a fifth of the folders is kept from training, for a score on places that the network has not seen
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command. A leaf has no `core.base.errors.entry_point`; the same endings stand here."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        make_lists(**vars(options))
    except SourceError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None:
            raise
        parser.exit(2, f"error: {error.filename}: {error.strerror}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=style, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--csv", type=Path, metavar="FILE", help="the table (default: OUT/train_clean.csv)")
    source.add_argument("--tree", type=Path, metavar="ROOT", help="the folder with a folder per class")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="ROOT",
        help="folder that holds the images of a table (default: OUT/train for Google Landmarks v2, the folder of your "
        "own table); lists name them relative to OUT if it lies in there, else by absolute paths",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="OUT", help="folder of the lists, DATA_DIR/TRAIN.DATASET (%(default)s)"
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="what to leave out, one a line, # begins a comment: image ids (16 of 0-9a-f) and landmark ids; without "
        "Google Landmarks v2, paths and classes",
    )
    parser.add_argument(
        "--allow-missing",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N images that are not there; more stop the command (%(default)s). All are listed in "
        f"OUT/{MISSING}",
    )
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of every class (%(default)s); 0: none")
    parser.add_argument(
        "--unseen",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=f"of the classes, kept from training and listed in OUT/{UNSEEN} (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws other validation images and unseen classes")
    parser.add_argument("--force", action="store_true", help="replace lists that differ")
    return parser


def make_lists(
    *,
    out: Path = OUT,
    csv: Path | None = None,
    tree: Path | None = None,
    images: Path | None = None,
    exclude: Path | None = None,
    allow_missing: int = 0,
    val: float = 0.2,
    unseen: float = 0.0,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write the lists to `out` and print a summary. Raises SourceError for whatever the user has to mend."""
    if not 0 <= val < 1:
        raise SourceError(f"--val {val}: the share for validation is at least 0 and below 1")
    if not 0 <= unseen < 1:
        raise SourceError(f"--unseen {unseen}: the share of the classes is at least 0 and below 1")
    if allow_missing < 0:
        raise SourceError(f"--allow-missing {allow_missing}: a number of images, at least 0")
    if tree is not None and images is not None:
        raise SourceError("--images goes with --csv; the images of --tree ROOT lie in ROOT")
    exclusions = read_exclusions(exclude) if exclude is not None else None
    listing, root = _source(out, csv, tree, images)
    count = len(listing.class_names)
    listing, excluded = _without_excluded(listing, exclusions)
    listing, missing = _without_missing(listing, root, out, allow_missing)
    new = unseen_classes(listing, share=unseen, seed=seed)
    listing, trained = with_classes_last(listing, new), int((~new).sum())
    of_unseen = listing.classes >= trained
    validation = validation_images(listing, share=val, seed=seed) & ~of_unseen
    files = list_files(listing, validation, of_unseen, prefix=path_prefix(root, out))
    changed = write_files(out, files, force=force)
    print(
        f"left out    {excluded} images excluded, {missing} missing, {count - len(listing.class_names)} whole classes"
    )
    _summarise(listing.keep(~of_unseen), validation[~of_unseen], out)
    if of_unseen.any():
        print(
            f"unseen      {int(new.sum())} classes with {int(of_unseen.sum())} images; extract and score them "
            f"with INFER.IMAGES {shlex.quote(str(out / UNSEEN))}"
        )
    there = [name for name, content in files.items() if content is not None]
    print(f"written: {', '.join(changed)} in {out}" if changed else f"unchanged: {', '.join(there)} in {out}")


def _source(out: Path, csv: Path | None, tree: Path | None, images: Path | None) -> tuple[Listing, Path]:
    """The listing and the folder that its paths start from."""
    if tree is not None:
        listing, others, hidden = read_tree(tree)
        if others:
            _note(f"{len(others)} files below {tree} are no images, the first is {others[0]!a}")
        if hidden:
            _note(hidden_note(len(hidden), hidden[0], tree))
        return listing, tree
    table = csv if csv is not None else out / "train_clean.csv"
    if not table.exists():
        raise SourceError(f"{table}: no such table; give one with --csv, or a folder per class with --tree")
    listing = read_csv(table)
    return listing, images if images is not None else out / "train" if listing.is_gldv2 else table.parent


def _without_excluded(listing: Listing, exclusions: Exclusions | None) -> tuple[Listing, int]:
    if exclusions is None:
        return listing, 0
    excluded, unknown = excluded_images(listing, exclusions)
    if unknown:
        _note(
            f"{len(unknown)} of {len(exclusions.entries)} entries name no listed image or class, the first is "
            f"{unknown[0]!a} ({exclusions.file}, line {exclusions.entries[unknown[0]]})"
        )
    if excluded.all():
        raise SourceError(f"{exclusions.file}: all images are excluded")
    return listing.keep(~excluded), int(excluded.sum())


def _without_missing(listing: Listing, root: Path, out: Path, allowed: int) -> tuple[Listing, int]:
    paths = [os.path.join(root, path) for path in listing.paths]
    missing = missing_files(paths)
    indices = np.flatnonzero(missing)
    named = "".join(f"{paths[i]}\n" for i in indices).encode("utf-8", "backslashreplace")
    if named or out.is_dir():
        write_files(out, {MISSING: named or None}, force=True)
    if not len(indices):
        return listing, 0
    counted = f"{len(indices)} of {len(listing.paths)} images missing"
    if len(indices) > allowed or len(indices) == len(listing.paths):
        mend = "give the right folder with --images" if len(indices) == len(listing.paths) else "complete the images"
        raise SourceError(
            f"{listing.where(indices[0])}: no such image: {root / listing.paths[indices[0]]} ({counted}, listed in "
            f"{out / MISSING}); {mend}, or leave out up to N with --allow-missing N"
            f"{note_on_path(root / listing.paths[indices[0]])}"
        )
    return listing.keep(~missing), len(indices)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _summarise(listing: Listing, validation: np.ndarray, out: Path) -> None:
    sizes = np.bincount(listing.classes)
    number, held_out = len(listing.paths), int(validation.sum())
    print(f"images      {number}, of which {held_out} for validation ({held_out / number:.1%})")
    print(f"classes     {len(sizes)}, of which {(sizes == 1).sum()} with a single image, which is for training")
    print(f"a class has {sizes.min()} to {sizes.max()} images, median {np.median(sizes):g}")
    folder = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    data_dir, name = shlex.quote(str(folder.parent)), shlex.quote(folder.name)
    test = f"TEST.DATASET {name}" if held_out else 'TEST.SPLIT ""'
    print(f"train with  MODEL.NUM_CLASSES {len(sizes)} DATA_LOADER.DATA_DIR {data_dir} TRAIN.DATASET {name} {test}")
