"""Make the toy landmarks: `python scripts/make_toy.py --out DIR [--seed N] [--contact-sheet FILE]`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from core.base.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> None:
    from datasets.toy.landmarks import contact_sheet, generate  # here: a missing package is told in one line

    parser = argparse.ArgumentParser(
        description="Make the toy landmarks in DIR/toy; a set of the same options is kept, another is replaced."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set is written to DIR/toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-landmarks", type=int, default=56)
    parser.add_argument("--views", type=int, default=18, help="training pictures a landmark")
    parser.add_argument("--val-views", type=int, default=3, help="validation pictures a landmark")
    parser.add_argument("--retrieval-landmarks", type=int, default=20)
    parser.add_argument("--queries", type=int, default=2, help="queries a retrieval landmark")
    parser.add_argument("--database-views", type=int, default=10, help="database pictures a retrieval landmark")
    parser.add_argument("--distractors", type=int, default=100, help="database pictures without any of the landmarks")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write an overview, a PNG")
    options = vars(parser.parse_args(argv))
    root, sheet = options.pop("out"), options.pop("contact_sheet")
    print(generate(root, **options))
    if sheet is not None:
        contact_sheet(root, sheet)


if __name__ == "__main__":
    main()
