#!/bin/sh
# sh scripts/test.sh [PYTEST ARGUMENTS]
# Runs the tests: all of them in two processes, or those that the arguments choose in one. Needs only python3 (>= 3.10)
# with venv: makes .venv first where there is none.
# Paths among the arguments are relative to the repository's root. PYTHON may name the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
make_environment requirements-dev.txt
cd "$root"
# Tests of one file share what it sets up. More processes would only fight: many tests start two of their own.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec "$python" -m pytest "$@"
