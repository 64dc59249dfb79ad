#!/bin/sh
# sh scripts/run_extractor.sh CFG [KEY VALUE ...]
# Extracts descriptors in shards, one process each, and waits for all. Exit code 0 only if every shard succeeded.
#
# With GPUs: one shard for each GPU of CUDA_VISIBLE_DEVICES, or for each that nvidia-smi lists. Without: one process on
# the CPU. SHARDS sets another number of shards; they take the GPUs in turn. CUDA_VISIBLE_DEVICES= runs on the CPU.
# The interpreter is $PYTHON, else .venv's, else python3.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
[ $# -ge 1 ] || fail "usage: [SHARDS=N] sh scripts/run_extractor.sh CFG [KEY VALUE ...]"
case " $* " in
*" INFER.TOTAL_NUM "* | *" INFER.CUT_NUM "*) fail "run_extractor.sh sets INFER.TOTAL_NUM and INFER.CUT_NUM itself; use SHARDS=N" ;;
esac
find_python
cfg=$1
shift

# The visible devices, one a line. As in CUDA, a negative index hides itself and all that follow.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    devices=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr -d ' ' | tr ',' '\n' | sed -e '/^-/,$d' -e '/^$/d')
else
    devices=$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
fi
if [ -n "$devices" ]; then
    gpus=$(printf '%s\n' "$devices" | wc -l)
else
    gpus=0
    set -- NUM_GPUS 0 "$@"
fi

shards=${SHARDS:-$((gpus > 0 ? gpus : 1))}
case $shards in
'' | 0* | *[!0-9]*) fail "SHARDS is $shards; it takes a whole number from 1 up" ;;
esac

# A signal ends the shards too. $! covers one that was started but not yet noted in pids.
stop() {
    trap - HUP INT TERM
    # shellcheck disable=SC2086  # pids is a list
    kill $pids ${!-} 2>/dev/null || true
    wait
    echo "run_extractor.sh: ended by a signal" >&2
    exit "$1"
}
pids=
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

shard=1
while [ "$shard" -le "$shards" ]; do
    device=
    if [ "$gpus" -gt 0 ]; then device=$(printf '%s\n' "$devices" | sed -n "$(((shard - 1) % gpus + 1))p"); fi
    CUDA_VISIBLE_DEVICES=$device "$python" "$root/evaler/infer.py" --cfg "$cfg" \
        INFER.TOTAL_NUM "$shards" INFER.CUT_NUM "$shard" "$@" &
    pids="$pids $!"
    shard=$((shard + 1))
done

failed=
shard=1
for pid in $pids; do
    wait "$pid" || failed="$failed $shard (exit code $?)"
    shard=$((shard + 1))
done
if [ -n "$failed" ]; then
    echo "error: of $shards shards these failed:$failed" >&2
    exit 1
fi
