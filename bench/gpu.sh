#!/bin/sh
# Every test and benchmark that needs a GPU, in nine minutes on one card: bench/gpu.sh [FOLDER] [--seconds 540]
# (bench/gpu.py). PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}" -m bench gpu "$@"
