"""What is searched faster than by looking at every image: building it, and putting more images into a set."""

import sys
from dataclasses import replace
from pathlib import Path

from core.arguments import parse
from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.config import load_cfg
from evaler.features.places import find_collection
from evaler.features.provenance import Purpose
from evaler.features.store import Features, FeaturesError, check_alike, load, read_manifest, read_records, some, write
from evaler.indexing import faiss_index, milvus_index


def add(folder: Path, collection: str, other: Path) -> int:
    """Put the images of another collection behind those of this one, and remove its faiss index; return their number.

    Names and descriptors stay together; a process that is killed leaves the old collection, or none that counts as
    whole. Raises `FeaturesError` for names that both have, and for descriptors made in another way.
    """
    other_place = find_collection(other)
    one, two = load(folder, collection), load(*other_place)
    check_alike(str(folder), one, str(other), two, Purpose.ADDABLE)
    differing = one.provenance.differing(two.provenance, Purpose.SAME_RUN)
    if differing:
        keys = ", ".join(differing)
        print(f"note: {other} differs in {keys}, no longer recorded for the merged set", file=sys.stderr)
    double = sorted(set(one.names) & set(two.names))
    if double:
        raise FeaturesError(f"{other}: {some(double)} is in {folder} already; nothing is added")
    for path in faiss_index.paths(folder, collection):
        path.unlink(missing_ok=True)
    provenance = replace(one.provenance, list_sha256=f"{one.provenance.list_sha256}+{two.provenance.list_sha256}")
    behind = len(one.names) + len(one.rejected)  # where the second list begins
    rejected = [entry._replace(index=entry.index + behind) for entry in two.rejected]
    records = [read_records(*place, read_manifest(*place)) for place in ((folder, collection), other_place)]
    if differing:
        records[1] = None  # an extraction that takes descriptors over from this set must not take these
    parts = [
        Features(f.names, f.vectors, f.sizes, provenance, reasons, f.machines, known)
        for f, reasons, known in zip((one, two), (one.rejected, rejected), records, strict=True)
    ]
    count = len(one.names) + len(two.names)
    if (one.dtype, two.dtype) == ("float16", "float32"):
        print("note: float32 descriptors are added to float16 ones and rounded", file=sys.stderr)
    write(folder, collection, parts, count=count, dim=one.vectors.shape[1], dtype=one.dtype)
    return len(two.names)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description="Build the faiss index SEARCH.INDEX of an extracted set, or insert it into the database SEARCH.URI."
    )
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--add", type=Path, metavar="OTHER", help="first add the images of this extracted set")
    parser.add_argument("index", type=Path, metavar="INDEX", help="OUT_DIR/features/<set>; behind it KEY VALUE ...")
    args, settings = parse(parser, argv)
    cfg = load_cfg(args.cfg, settings)
    if not (cfg.SEARCH.INDEX or cfg.SEARCH.URI or args.add):
        raise UserError("SEARCH.INDEX is empty, which is exact search and needs no index; name a factory string")
    folder, collection = find_collection(args.index)
    if args.add is not None:
        count = add(folder, collection, args.add)
        print(f"{folder}: {count} images added, {read_manifest(folder, collection)['count']} in all")
    if cfg.SEARCH.INDEX:
        recall = faiss_index.build(cfg, folder, collection)
        path, _ = faiss_index.paths(folder, collection)
        line = f"{100 * recall:.1f} % of the exact first {faiss_index.PROBED_TOP} are found"
        print(f"{path}: {cfg.SEARCH.INDEX}, {line}")
    if cfg.SEARCH.URI:
        name, count = milvus_index.build(cfg.SEARCH.URI, folder, collection)
        print(f"{cfg.SEARCH.URI}: {count} descriptors in {name}")
