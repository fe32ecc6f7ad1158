#!/bin/sh
# Everything a GPU is needed for, in one go: the kernels' numbers on it, then the benchmarks. bench/gpu.sh [FOLDER]
set -eu
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python -m pytest tests/test_kernels_augment.py tests/test_kernels_info_nce.py tests/test_kernels_epilogue.py tests/test_kernels_cond_norm.py tests/test_cond_norm.py tests/test_info_nce_cuda.py tests/test_info_nce_gpu.py
python -m bench augment --device cuda --json "$out/augment-gpu.json"
python -m bench info_nce --device cuda --json "$out/info_nce-gpu.json"
python -m bench cond_norm --device cuda --json "$out/cond_norm-gpu.json"
python -m bench generator --device cuda --json "$out/generator-gpu.json"
