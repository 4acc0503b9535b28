#!/usr/bin/env bash
# Makes .venv with everything that the project needs. Running it again is quick, and repairs an
# environment that was left half made.
#
#   bash scripts/setup.sh [--no-detection]
#
# --no-detection leaves out requirements-detection.txt (mmcv is compiled, 3 to 6 minutes on 2 cores).
# PYTHON=/path/to/python chooses the interpreter, MAX_JOBS=N the number of compiler processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

detection=true
for argument in "$@"; do
    case "$argument" in
        --no-detection) detection=false ;;
        *) echo "setup.sh: unknown argument '$argument'; usage: bash scripts/setup.sh [--no-detection]" >&2; exit 2 ;;
    esac
done

venv=.venv
python=$venv/bin/python
# Present only while pip writes packages: if a run finds it, the one before was killed half way.
installing=$venv/.installing
supported='import sys; assert (3, 11) <= sys.version_info < (3, 13)'

fail() {
    echo "setup.sh: failed at: $1" >&2
    echo "setup.sh: what to do: $2" >&2
    exit 1
}

# step NAME REMEDY COMMAND...
step() {
    local name=$1 remedy=$2
    shift 2
    echo "setup.sh: $name"
    "$@" || fail "$name" "$remedy"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
        # A pyenv shim can be on the PATH and yet not run, and Debian splits ensurepip off: so try it.
        if "$candidate" -c "$supported; import ensurepip" > /dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

pip_install() {
    touch "$installing"
    local status=0
    "$python" -m pip install --quiet --disable-pip-version-check "$@" || status=$?
    # pip has rolled back what it could not finish, so a failure needs no rebuild.
    rm -f "$installing"
    return $status
}

# What a stamp holds: the files that it vouches for, and the interpreter.
fingerprint() {
    { cat "$@" && "$python" -VV; } | cksum
}

stamped() {
    local stamp=$1
    shift
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$@")" ]
}

usable() {
    [ ! -e "$installing" ] && "$python" -c "$supported; import pip._internal.cli.main" > /dev/null 2>&1
}

make_venv() {
    local interpreter
    interpreter=$(find_python) || fail "find Python 3.11 or 3.12" \
        "install one with its venv module (on Debian: apt-get install python3 python3-venv python3-dev), or set PYTHON=/path/to/python"
    step "make $venv with $("$interpreter" --version)" "delete $venv, see that the disk has 8 GB free, and run this again" \
        "$interpreter" -m venv --clear "$venv"
}

install_core() {
    step "install requirements.txt, requirements-dev.txt, requirements-export.txt and requirements-look.txt" \
        "see the message of pip above; when the network or the disk is cured, run this again" \
        pip_install -r requirements.txt -r requirements-dev.txt -r requirements-export.txt -r requirements-look.txt
    step "import what was installed" "delete $venv and run this again" \
        "$python" -c 'import matplotlib, onnxruntime, onnxscript, pytest, sklearn, tensorboardX, timm, torch, torchcam, torchvision'
    fingerprint "${core_files[@]}" > "$venv/.core"
}

can_compile() {
    "$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null &&
        command -v "${CXX:-c++}" > /dev/null
}

# Most of the time that a file of mmcv takes goes into torch's headers: they are compiled once, into the folder $1. Where
# the build's flags differ from these ones, the compiler reads the headers as text, which is only slower.
precompile_headers() {
    local include
    include=$("$python" -c 'import sysconfig; print("-I", sysconfig.get_paths()["include"])
from torch.utils.cpp_extension import include_paths; print(*["-isystem " + path for path in include_paths()])' 2> /dev/null)
    printf '#include <torch/types.h>\n#include <vector>\n' > "$1/headers.h"
    # shellcheck disable=SC2086
    "${CXX:-c++}" $CFLAGS $include -fPIC -std=c++17 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext \
        -x c++-header "$1/headers.h" -o "$1/headers.h.gch" 2> /dev/null || rm -f "$1/headers.h.gch"
}

install_mmcv() {
    # mmcv asks for CUDA operators wherever it sees a GPU, and then fails without the compiler for them.
    if ! command -v nvcc > /dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
        local -x CUDA_VISIBLE_DEVICES=
    fi
    local -x MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc 2> /dev/null || echo 2)}
    # Python's own flags ask for debug information, which doubles the compiler's time.
    local -x CFLAGS="-O2 -g0 -DNDEBUG -fwrapv ${CFLAGS:-}"
    local headers status=0
    headers=$(mktemp -d)
    # not where pip has what it compiled before, nor in a folder whose name CFLAGS would take apart
    if [[ "$*" == *--no-cache-dir* ]] || ! "$python" -m pip cache list mmcv 2> /dev/null | grep --quiet mmcv &&
        [[ "$headers" != *[[:space:]]* ]]; then
        precompile_headers "$headers"
        CFLAGS+=" -include $headers/headers.h"
    fi
    pip_install --no-build-isolation "$@" "$(grep '^mmcv=' requirements-detection.txt)" || status=$?
    rm -rf "$headers"
    return $status
}

detection_works() {
    "$python" -c 'import mmdet, mmengine, pycocotools; from mmcv.ops import RoIAlign, nms'
}

install_detection() {
    step "install requirements-detection.txt" \
        "see the message of pip above; when the network or the disk is cured, run this again" \
        pip_install -r <(grep -v '^mmcv=' requirements-detection.txt)
    step "look for a C++ compiler and the headers of Python" \
        "install them (on Debian: apt-get install g++ python3-dev), or leave detection out with --no-detection" \
        can_compile
    step "compile mmcv (3 to 6 minutes on 2 cores, once: pip keeps the result)" \
        "see the compiler's message above, or leave detection out with --no-detection" \
        install_mmcv
    # pip's cache knows neither torch's version nor MMCV_WITH_OPS, so what it kept may not fit.
    if ! detection_works > /dev/null 2>&1; then
        step "compile mmcv afresh, as the one that pip kept does not load" \
            "see the compiler's message above, or leave detection out with --no-detection" \
            install_mmcv --no-cache-dir --force-reinstall --no-deps
    fi
    step "import what was installed" \
        "see the message above; where libGL is missing (on Debian: apt-get install libgl1 libglib2.0-0)" detection_works
    fingerprint "${detection_files[@]}" > "$venv/.detection"
}

# One at a time: a second run waits here, and then finds the work done. Systems without flock go without.
if command -v flock > /dev/null; then
    exec 9< scripts/setup.sh
    flock 9
fi

core_files=(requirements.txt requirements-dev.txt requirements-export.txt requirements-look.txt)
detection_files=(requirements.txt requirements-detection.txt)

usable || make_venv
stamped "$venv/.core" "${core_files[@]}" || install_core
if $detection; then
    stamped "$venv/.detection" "${detection_files[@]}" || install_detection
fi
echo "setup.sh: $venv is ready"
