#!/usr/bin/env bash
# lmms-eval 0.7 asks a running server twenty questions about handwritten digits and prints its table of scores.
#
#     python tools/serve.py --model runs/quickstart/hf --port 8000          # in another terminal
#     examples/evaluate/lmms_eval.sh .venv-lmms http://127.0.0.1:8000/v1 [MORE ...]
#
# The first argument is a virtual environment, made if it is missing (lmms-eval wants other versions of many packages than
# we do); the second is the server's address. What follows goes to lmms-eval, e.g. --limit 5 or --log_samples. A server
# with an API key is asked with OPENAI_API_KEY. Nothing is downloaded but the packages: the task lies in digits/.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$(dirname "$1")"
venv=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
url=$2
shift 2
cd "$(dirname "$0")/digits"

# PyTorch first, as in the Makefile: without an NVIDIA driver its CPU build, and torchvision of the same build with it.
# pip finds them where the package index at hand carries them; uv knows PyTorch's own index of CPU builds; where neither
# does, the CUDA builds run on the CPU too, at some gigabytes more.
cpu_builds() {
  "$venv/bin/pip" install "torch==2.13.0+cpu" "torchvision==0.28.0+cpu" || {
    "$venv/bin/pip" install uv &&
      "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu torch==2.13.0 torchvision==0.28.0
  }
}
if ! "$venv/bin/python" -c "import lmms_eval" 2>/dev/null; then
  test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
  { ! command -v nvidia-smi >/dev/null 2>&1 && cpu_builds; } || "$venv/bin/pip" install torch torchvision
  "$venv/bin/pip" install "lmms-eval==0.7"
fi

# The hub is never asked; the table of the questions is cached in a folder that goes away again.
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export HF_HOME="$cache" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"
"$venv/bin/python" -m lmms_eval --model openai --model_args "model_version=quickstart,base_url=$url,num_concurrent=8" \
  --include_path . --tasks digits "$@"
