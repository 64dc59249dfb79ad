"""Download retrieval sets: `python scripts/download_revisitop.py [roxford5k] [rparis6k] [revisitop1m]`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.sources.download_sets")
