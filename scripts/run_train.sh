#!/bin/sh
# sh scripts/run_train.sh CFG [KEY VALUE ...]
# Trains. One process per GPU (NUM_GPUS) is started by train.py itself; NUM_GPUS 0 trains on the CPU.
# The interpreter is $PYTHON, else .venv's, else python3.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
[ $# -ge 1 ] || fail "usage: sh scripts/run_train.sh CFG [KEY VALUE ...]"
find_python
cfg=$1
shift
exec "$python" "$root/train.py" --cfg "$cfg" "$@"
