#!/bin/sh
# sh scripts/demo.sh
# Makes the toy landmarks, scores an untrained network on them, trains it, scores it again, and puts both on a page of
# pictures; a few minutes on two CPU cores. Needs only python3 (>= 3.10) with venv: makes .venv first where there is
# none. What a former run has finished is kept, what is missing is made again. PYTHON may name the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
[ $# -eq 0 ] || fail "usage: sh scripts/demo.sh"
make_environment
cd "$root"
config=configs/resnet18_dolg_toy.yaml

# run FILE ARGUMENT...: show a command and run it
run() {
    case $1 in
    *.sh) interpreter=sh ;;
    *) interpreter=python ;;
    esac
    printf '\n$ %s %s\n' $interpreter "$*"
    if [ $interpreter = sh ]; then PYTHON=$python sh "$@"; else "$python" "$@"; fi
}

# score RUN: extract and score with the newest checkpoint of output/demo/RUN
score() {
    run scripts/run_extractor.sh $config OUT_DIR "output/demo/$1"
    run evaler/evaluate.py --cfg $config OUT_DIR "output/demo/$1"
    cp "output/demo/$1/scores/toy.json" "output/demo/$1.json"
}

run scripts/make_toy.py --out output/demo/data
run train.py --cfg $config OUT_DIR output/demo/untrained OPTIM.MAX_EPOCH 0
score untrained
run train.py --cfg $config OUT_DIR output/demo/trained
score trained
run evaler/report.py --cfg $config --against output/demo/trained --out output/demo/report.html OUT_DIR output/demo/untrained
printf '\nEverything lies in output/demo: data/toy (pictures), untrained.json and trained.json (scores), trained/ (checkpoints, descriptors);\n'
printf 'report.html shows what each query found before and after: open it in a browser.\n'
