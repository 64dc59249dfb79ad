"""Time ours against the published way: python scripts/benchmark.py all|head|loader|step|..."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("scripts.benchmarks.command")
