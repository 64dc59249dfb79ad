"""Score a set whose images have labels: python evaler/evaluate_labels.py INDEX [--labels CSV]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.scoring.labels")
