#!/bin/sh
# sh scripts/run_extractor.sh CFG [KEY VALUE ...]
# Extracts descriptors in shards, one process each, and waits for all. Run it again to finish only what is missing.
#
# With GPUs: one shard for each GPU of CUDA_VISIBLE_DEVICES, or for each that nvidia-smi lists. Without: one for every
# INFER.THREADS cores of the CPU. SHARDS sets another number of shards; they take the GPUs in turn.
# CUDA_VISIBLE_DEVICES= runs on the CPU. What each shard prints is in OUT_DIR/logs.
# Exit code 0 only if every shard succeeded. The interpreter is $PYTHON, else .venv's, else python3.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
[ $# -ge 1 ] || fail "usage: [SHARDS=N] sh scripts/run_extractor.sh CFG [KEY VALUE ...]"
find_python
exec "$python" "$root/scripts/run_extractor.py" "$@"
