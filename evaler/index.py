"""Build a faiss index, or add images to a set: python evaler/index.py --cfg FILE INDEX [--add OTHER] [KEY VALUE ...]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.indexing.command")
