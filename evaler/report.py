"""A page of pictures of one run or two: python evaler/report.py --cfg FILE [--against OUT_DIR] [KEY VALUE ...]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from core.base.door import run

    run("evaler.pages.report_page")
