#!/bin/sh
# Everything a GPU is needed for, in one go: the kernels' numbers on it, then the benchmarks. bench/gpu.sh [FOLDER]
set -eu
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python -m pytest tests/test_kernels_augment.py
python -m bench augment --device cuda --json "$out/augment-gpu.json"
