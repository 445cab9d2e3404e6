#!/bin/sh
# Installs the wheels beside this script into a folder of their own, without a network, and starts the benchmark there. `make gpu-bundle` puts it
# into .gpu-bundle; from the project's root: OUT=FOLDER sh .gpu-bundle/run.sh [options of python -m benchmarks.gpu]
set -eu
: "${OUT:?OUT=FOLDER is needed: where the results go}"
bundle=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$@"
}
# A wheel for another Python stops all of them; without it only what needs it fails.
install "$bundle"/*.whl || for wheel in "$bundle"/*.whl; do install "$wheel" || echo "left out: ${wheel##*/}" >&2; done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" -u -m benchmarks.gpu --out "$OUT" "$@"
