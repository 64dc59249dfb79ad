#!/bin/sh
# sh scripts/download_revisitop.sh [roxford5k|rparis6k|revisitop1m]... [--data-dir DIR] [--keep-archives]
# Downloads retrieval sets (default: roxford5k rparis6k) into datasets/data/, unpacks them and checks that every image
# named in the ground truth or the list is there. revisitop1m, the million distractors, takes hundreds of GB. Run again
# to go on after a break: no archive that was unpacked is fetched again.
# Mirrors: ROXFORD_BASE_URL, RPARIS_BASE_URL, GROUNDTRUTH_BASE_URL, REVISITOP1M_BASE_URL.
# The interpreter is $PYTHON, else .venv's, else python3.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
find_python
exec "$python" "$root/scripts/download_revisitop.py" "$@"
