#!/bin/sh
# sh scripts/download_pretrained.sh [R-50 R-101 R-152 X-50 X-101]
# Downloads ImageNet weights of the backbones into pretrained/ (default: R-50 R-101). A download that was broken off is
# continued, a file that is there is kept. pretrained/README.md tells where the files come from.
# PYCLS_BASE_URL may name a mirror. The interpreter is $PYTHON, else .venv's, else python3.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
base=${PYCLS_BASE_URL:-https://dl.fbaipublicfiles.com/pycls/dds_baselines}

# path_of NAME: the file's path below the base address
path_of() {
    case $1 in
    R-50) echo 161235311/R-50-1x64d_dds_8gpu.pyth ;;
    R-101) echo 161167170/R-101-1x64d_dds_8gpu.pyth ;;
    R-152) echo 161167467/R-152-1x64d_dds_8gpu.pyth ;;
    X-50) echo 161167411/X-50-32x4d_dds_8gpu.pyth ;;
    X-101) echo 161167590/X-101-32x4d_dds_8gpu.pyth ;;
    *) fail "unknown weights $1; known are R-50 R-101 R-152 X-50 X-101" ;;
    esac
}

[ $# -gt 0 ] || set -- R-50 R-101
for name in "$@"; do path_of "$name" >/dev/null; done # all names are checked before anything is downloaded
find_python
for name in "$@"; do
    path=$(path_of "$name")
    "$python" "$root/scripts/download.py" "$base/$path" "$root/pretrained/${path##*/}"
done
