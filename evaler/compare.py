"""Compare two scores, query by query: python evaler/compare.py A.json B.json"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.scoring.comparison")
