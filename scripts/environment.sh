# Sourced by the starters, in POSIX sh. Before: `root` is the repository's root. After either function: `python` is the
# interpreter to use.
#
#   make_environment [FILE...]  make .venv, or complete it, from the requirement file for this machine
#                               (requirements.txt where there is an NVIDIA GPU, else requirements-cpu.txt) and the FILEs
#   find_python                 install nothing: take $PYTHON, else .venv, else python3
#
# PYTHON names an interpreter (default python3); make_environment makes .venv with it.
#
# .venv/<requirement file>.installed holds that file's checksum once it is installed; .venv/unfinished stands there
# while an installation is under way, so that one that was broken off is started over from nothing.
# shellcheck shell=sh

fail() {
    echo "error: $*" >&2
    exit 2
}

# has_pip PYTHON: it runs, is new enough and finds pip (after an upgrade of the system's Python a .venv does not)
has_pip() {
    "$1" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# is_python COMMAND: not every command that ends well is one
is_python() {
    [ "$("$1" -c 'print("python")' 2>/dev/null)" = python ]
}

# ready FILE...: .venv works and holds these requirement files as they are now
ready() {
    [ ! -e "$venv/unfinished" ] || return 1
    for file in "$@"; do
        [ "$(cat "$venv/$file.installed" 2>/dev/null)" = "$(cksum <"$root/$file")" ] || return 1
    done
    has_pip "$python"
}

make_environment() {
    venv=$root/.venv
    python=$venv/bin/python
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        set -- requirements.txt "$@"
        other=requirements-cpu.txt
    else
        set -- requirements-cpu.txt "$@"
        other=requirements.txt
    fi
    if ready "$@"; then return; fi

    maker=${PYTHON:-python3}
    command -v "$maker" >/dev/null 2>&1 || fail "$maker not found: install Python 3.10 or newer, or name one in PYTHON"
    "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$maker is $("$maker" -V 2>&1); Python 3.10 or newer is needed, PYTHON may name one"
    is_python "$maker" || fail "$maker is no Python: name one in PYTHON"
    "$maker" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$maker has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)"

    # One installer at a time: the lock belongs to this shell's descriptor 9 until that is closed.
    exec 9>"$root/.venv.lock"
    "$maker" -c 'import fcntl; fcntl.flock(0, fcntl.LOCK_EX)' <&9
    ready "$@" || install "$@"
    exec 9>&-
}

# install FILE...
install() {
    if [ -e "$venv/unfinished" ] || [ -e "$venv/$other.installed" ] || ! has_pip "$python"; then
        if [ -e "$venv" ]; then echo "making .venv anew: it is unfinished, broken or for another kind of machine"; fi
        rm -rf "$venv"
        mkdir "$venv"
        : >"$venv/unfinished"
        "$maker" -m venv "$venv" || fail "$maker -m venv failed"
    fi
    : >"$venv/unfinished"
    echo "installing $* into .venv"
    # --no-compile: bytecode of what is never imported is most of an installation's time.
    # shellcheck disable=SC2046  # the files' names have no blanks
    (cd "$root" && "$python" -m pip install --disable-pip-version-check --no-compile $(printf ' -r %s' "$@")) ||
        fail "could not install $*: see above, then run this again"
    for file in "$@"; do cksum <"$root/$file" >"$venv/$file.installed"; done
    rm "$venv/unfinished"
}

find_python() {
    python=${PYTHON:-python3}
    if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ] && [ ! -e "$root/.venv/unfinished" ]; then
        python=$root/.venv/bin/python
    fi
    is_python "$python" || fail "$python is no Python that runs: name one in PYTHON, or run sh scripts/test.sh, which makes .venv"
}
