#!/bin/sh
# sh scripts/test.sh [PYTEST ARGUMENTS]
# Runs the tests. Needs only python3 (>= 3.10) with venv: makes .venv first where there is none.
# Paths among the arguments are relative to the repository's root. PYTHON may name the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
make_environment requirements-dev.txt
cd "$root"
exec "$python" -m pytest "$@"
