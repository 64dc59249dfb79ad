"""Learn PCA whitening: python evaler/whiten.py OUT_DIR/features/<set> OUT.npz [--dim D]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.refinement.whitening")
