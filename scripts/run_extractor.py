"""Extract in shards, one process each: python scripts/run_extractor.py CFG [KEY VALUE ...]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.extraction.shards")
