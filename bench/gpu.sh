#!/bin/sh
# Everything a GPU is needed for, in nine minutes on one card: tests, then benchmarks, what matters most first.
#
#     bench/gpu.sh [FOLDER]
#
# FOLDER (runs/gpu) gets tests-*.xml, AREA-gpu.json, a log of each part, the plots and report.html. Each part has its
# seconds; one that fails or overruns keeps the rows it has, and the next one starts. The end is the table of
# `python -m bench check`; the exit code is 0 where all parts but the rest ran and all numbers are met.
#
# SECONDS_IN_ALL (540) changes the time there is, PYTHON the interpreter.
set -u
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
end=$(($(date +%s) + ${SECONDS_IN_ALL:-540} - 15)) # the table and the page take the rest
unfinished=""
mkdir -p "$out"

# part NAME SECONDS COMMAND...: run it for so long at most, or for what is left.
part() {
    name=$1 seconds=$2
    shift 2
    left=$((end - $(date +%s)))
    [ "$seconds" -gt "$left" ] && seconds=$left
    echo "== $name, $seconds s at most"
    if [ "$seconds" -lt 2 ]; then
        echo "no time is left for it"
        unfinished="$unfinished $name"
        return
    fi
    # As Ctrl-C does: then pytest still writes what the tests said that it got to.
    timeout -s INT -k 8 "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 25 "$out/$name.log"
    if [ "$code" -ne 0 ]; then
        echo "$name ended with code $code (124: out of time)"
        unfinished="$unfinished $name"
    fi
}

tests() {
    name=$1 seconds=$2
    shift 2
    part "tests-$name" "$seconds" "$python" -m pytest -n 4 --dist loadfile --junitxml "$out/tests-$name.xml" "$@"
}

# measure AREA NAME SECONDS OPTIONS...
measure() {
    area=$1 name=$2 seconds=$3
    shift 3
    part "$name" "$seconds" "$python" -m bench "$area" --device cuda --repeats 10 --json "$out/$name-gpu.json" "$@"
}

rm -f "$out"/tests-*.xml "$out"/*-gpu.json
# Not the interpreter's, which needs no GPU and takes minutes.
tests kernels 100 -k "not cpu" tests/ops/test_info_nce_gpu.py tests/csrc/test_info_nce_cuda.py tests/kernels/test_info_nce.py \
    tests/kernels/test_augment.py tests/kernels/test_cond_norm.py tests/kernels/test_epilogue.py tests/ops/test_cond_norm.py
measure navigator navigator 140 --only bigbigan
measure pretrain pretrain 60 --only resnet50
measure augment augment 55 --only "simclr B=352"
measure info_nce info_nce 40 --only "N=16384"
measure generator generator 55 --only "bigbigan B=256"
tests stages 45 tests/training/test_cuda_graph.py tests/stages/test_navigator.py tests/stages/test_pretrain.py tests/pairs/read/test_dali.py \
    tests/pairs/write/test_pinned.py tests/generators/test_bigbigan.py tests/generators/test_biggan_deep.py
measure loader loader 20 --only png
# What is left of the time goes to the rest, which may be cut off.
required=$unfinished
measure info_nce info_nce-rest 30 --only "D=128"
measure cond_norm cond_norm 20
measure convolutions convolutions 20
measure augment augment-rest 20 --only "B=64"

set --
for file in "$out"/*-gpu.json "$out"/tests-*.xml; do
    [ -e "$file" ] && set -- "$@" "$file"
done
if [ "$#" -eq 0 ]; then
    echo "nothing was measured"
    exit 1
fi
echo "== numbers asked for"
"$python" -m bench check --require cuda "$@"
met=$?
"$python" -m bench report --out "$out" "$@" >"$out/report.log" 2>&1 || echo "no plots: see $out/report.log"
[ -n "$unfinished" ] && echo "failed or cut off:$unfinished"
[ "$met" -eq 0 ] && [ -z "$required" ]
