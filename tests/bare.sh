#!/bin/sh
# What works in a bare container, a line a check: without C compiler, Python.h, nvcc and network, which are hidden in
# Linux namespaces. Exits with 0 where all is as documented, 77 where namespaces aren't permitted.
#
# tests/bare.sh --quick    bench/gpu.sh's refusal, on a copy of the sources without compiled parts
# tests/bare.sh            the ops and doctor, too
# tests/bare.sh WHEELS     also installs from a folder of wheels, as bench/gpu.sh --wheels does (docs/versions.md)
#
# PYTHON names an interpreter that has torch.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}

if [ "${1:-}" != --inside ]; then
    unshare --map-root-user --mount --net true 2>/dev/null || { echo "namespaces are not permitted here"; exit 77; }
    [ "${1:---quick}" = --quick ] || set -- "$(realpath "$1")"
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    without=$(printf -- ' --exclude=%s' './.*' ./runs ./build '*.so' __pycache__)
    tar -c -C . $without . | tar -x -C "$copy"
    unshare --map-root-user --mount --net env -i HOME="$copy" PATH="$PATH" PIP_CONFIG_FILE=/dev/null PYTHON="$PYTHON" \
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-}" sh "$copy/tests/bare.sh" --inside "$@"
    exit
fi

wheels=${2:-}
log=$HOME/log
failed=0

report() {  # NAME, after a test of $log
    if [ $? = 0 ]; then
        echo "ok    $1"
    else
        failed=1
        echo "FAIL  $1"
        tail -n 15 "$log"
    fi
}

# check NAME EXIT_CODE COMMAND...: the command ends with that code. Then said NAME PATTERN: its output has such a line.
check() {
    name=$1 expected=$2 code=0
    shift 2
    "$@" >"$log" 2>&1 || code=$?
    { [ $code = "$expected" ] || echo "exit code $code" >>"$log"; [ $code = "$expected" ]; } && true
    report "$name"
}
said() { grep -Eq "$2" "$log" && true; report "$1"; }

compilers="cc c++ gcc g++ clang clang++ nvcc"
for folder in $(echo "$PATH" | tr : ' ') /usr/local/cuda*/bin; do
    for compiler in $compilers; do
        [ ! -e "$folder/$compiler" ] || mount --bind /dev/null "$(realpath "$folder/$compiler")"
    done
done
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ ! -d "$include" ] || mount -t tmpfs none "$include"
# An editable install would find the compiled parts for the copy, too.
for file in $("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/__editable__.copgen_fast*.pth; do
    [ ! -e "$file" ] || mount --bind /dev/null "$file"
done

check "there is no compiler" 1 sh -c "for c in $compilers; do command -v \$c && exit; done; exit 1"
check "there is no Python.h" 1 test -e "$include/Python.h"
check "there is no network" 1 "$PYTHON" -c 'import socket; socket.create_connection(("192.0.2.1", 80), 5)'

if [ -n "$wheels" ] && [ "$wheels" != --quick ]; then
    check "bench/gpu.sh --wheels installs, and stops" 2 bench/gpu.sh --wheels "$wheels" out
    cp "$log" "$HOME/installed"
    check "... no test lacks a package" 1 grep -E "missing: .*(pytest|xdist|hypothesis|torchvision)" "$HOME/installed"
    PYTHON=$HOME/runs/gpu-venv/bin/python
    check "pip install . without a compiler" 0 "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation .
    cd /
    check "the installed package is imported" 0 "$PYTHON" -c 'import copgen_fast; print(copgen_fast.__file__)'
    said "... from site-packages" 'site-packages/copgen_fast/__init__'
fi
if [ "$wheels" != --quick ]; then
    check "doctor: the ops are accurate on the CPU" 0 "$PYTHON" -m copgen_fast.doctor --quick
    said "... without compiled parts" 'augment .*reference .*the C\+\+ extension is not built'
fi
cd "$HOME"
check "bench/gpu.sh stops" 2 env PYTHON="$PYTHON" bench/gpu.sh out
said "... as a GPU is missing" '^missing: a GPU'
said "... and says that Triton needs a C compiler" "^missing: for Triton's kernels, a C compiler"
said "... and the CUDA extension nvcc" 'there is no nvcc'
exit $failed
