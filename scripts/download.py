"""Download one file, resumably: `python scripts/download.py URL FILE`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("core.base.download")
