"""Draw the curves of training runs: python scripts/plot_run.py OUT_DIR [OUT_DIR ...] [--out FILE.png]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("scripts.plots.run_plot")
