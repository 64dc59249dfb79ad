"""Make the list files of a landmark set: python datasets/gldv2.py [--csv FILE | --tree ROOT] [--images ROOT] ..."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("datasets.lists.command")
