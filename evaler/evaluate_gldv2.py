"""Score by Google Landmarks v2: python evaler/evaluate_gldv2.py retrieval|recognition SOLUTION.csv QUERIES SEARCHED"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.scoring.gldv2")
