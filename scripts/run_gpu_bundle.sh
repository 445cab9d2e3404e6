#!/usr/bin/env bash
# On a machine with a GPU, from the project's root: OUT=FOLDER bash .gpu-bundle/run.sh [options of benchmarks.gpu]
set -euo pipefail
bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$(mktemp -d)
read -ra needs <"$bundle/needs.txt"
python3 -m pip install --quiet --no-index --no-deps --no-compile --find-links "$bundle" --target "$site" "${needs[@]}"
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec python3 -m benchmarks.gpu --out "${OUT:-benchmarks/results/gpu}" "$@"
