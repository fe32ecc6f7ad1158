#!/bin/sh
# Every test and benchmark that needs a GPU, in nine minutes on one card: bench/gpu.sh [FOLDER] [--seconds 540]
# (bench/gpu.py). PYTHON chooses the interpreter.
#
# Without network, on an image that has torch: bench/gpu.sh --wheels WHEELS [FOLDER] [--seconds 540] installs the package
# and what the parts need from a folder of wheels, into runs/gpu-venv, which sees the image's packages
# (docs/versions.md says how to fill the folder).
set -eu
cd "$(dirname "$0")/.."
if [ "${1:-}" = --wheels ]; then
    [ -d "${2:-}" ] || { echo "--wheels: there is no folder ${2:-}: see docs/versions.md" >&2; exit 2; }
    wheels=$2
    shift 2
    venv=runs/gpu-venv
    if [ ! -x $venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv --system-site-packages $venv
        # Where the image's packages are in an environment, too, the system's are not those.
        "${PYTHON:-python3}" -c 'import sys; print(*(x for x in sys.path if x.endswith("-packages")), sep="\n")' \
            >"$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/image.pth"
    fi
    install() { $venv/bin/python -m pip install --quiet --no-index --find-links "$wheels" --no-build-isolation "$@"; }
    install 'setuptools>=77' wheel ninja
    needed=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml)
    # What torch needs is the image's affair, and need not be listed as installed packages.
    install --no-deps $(echo "$needed" | grep ^torch)
    install $(echo "$needed" | grep -v ^torch)
    install --no-deps -e .
    for package in pytest pytest-xdist hypothesis kornia-rs kornia lightly pytorch-metric-learning \
        pytorch-pretrained-biggan simplejpeg; do
        install "$package" 2>/dev/null || install --no-deps "$package" 2>/dev/null ||
            echo "missing: $package is not in $wheels"
    done
    PYTHON=$venv/bin/python
fi
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}" -m bench gpu "$@"
