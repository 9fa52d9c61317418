#!/usr/bin/env bash
# Makes an environment with bitfold, ExecuTorch and LiteRT, for exports to phones and for `bitfold verify`.
#
#   scripts/make_phones_environment.sh DIRECTORY [PYTHON]
#
# ExecuTorch brings packages that bitfold does not need, so it has a place of its own: 2 GB, some minutes. On Linux PyPI's
# torch brings gigabytes of CUDA. For the CPU alone:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/make_phones_environment.sh DIRECTORY
set -euo pipefail

TORCH=2.13.0
EXECUTORCH=1.5.1
LITERT=2.3.0
NEEDED_KB=$((4 * 1024 * 1024))

if (($# < 1 || $# > 2)); then
    echo "usage: $0 DIRECTORY [PYTHON]" >&2
    exit 2
fi
directory=$1
python=${2:-python3.11}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -e $directory ]]; then
    echo "$directory exists already: remove it or give another directory." >&2
    exit 1
fi
mkdir -p "$(dirname "$directory")"
free=$(df --output=avail --block-size=1K "$(dirname "$directory")" | tail -n 1)
if ((free < NEEDED_KB)); then
    echo "$(dirname "$directory") has $((free / 1024 / 1024)) GB free, and 4 GB are needed: give another directory." >&2
    exit 1
fi
# Half an environment is worse than none.
finished=
trap '[[ -n $finished ]] || rm -rf -- "$directory"' EXIT

"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip --quiet --disable-pip-version-check)
echo "installing torch $TORCH"
"${pip[@]}" install "torch==$TORCH"
echo "installing ExecuTorch $EXECUTORCH and LiteRT $LITERT"
"${pip[@]}" install "torch==$TORCH" "executorch==$EXECUTORCH" "ai-edge-litert==$LITERT"
echo "installing bitfold"
"${pip[@]}" install "torch==$TORCH" psutil --constraint "$here/constraints.txt" "$here"
echo "trying it"
"$directory/bin/python" -W ignore -c 'import executorch.runtime, ai_edge_litert.interpreter, bitfold'
finished=yes
echo "made: $directory/bin/bitfold export ARTIFACT --to executorch -o OUT"
echo "      bitfold verify OUT --engine-python $directory/bin/python"
