#!/usr/bin/env bash
# build.sh PYTHON FOLDER: builds the emulated GPU into FOLDER, for a PYTHON whose torch is a CUDA build.
# Needs gcc, g++ and the CUDA toolkit's headers (CUDA_HOME, default /usr/local/cuda).
set -euo pipefail
python=$1 out=$2
cd "$(dirname "${BASH_SOURCE[0]}")"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
toolkit=${CUDA_HOME:-/usr/local/cuda}/include wheels=$(dirname "$(ls "$site"/nvidia/cu*/include/cublas_v2.h | head -1)")
for header in "$toolkit/crt/host_defines.h" "$wheels/cublas_v2.h"; do
    [ -f "$header" ] || { echo "$header is missing" >&2; exit 2; }
done
mkdir -p "$out"
gcc -c -fPIC -w nccl.c -o "$out/nccl.o"
g++ -O1 -shared -fPIC -w -I"$toolkit" -I"$wheels" cudart.cpp "$out/nccl.o" -o "$out/cudart.so" -ldl -lpthread
gcc -shared -fPIC -w cuda.c -o "$out/libcuda.so.1"
gcc -shared -fPIC -w nvml.c -o "$out/libnvidia-ml.so.1"
