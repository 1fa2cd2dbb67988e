#!/usr/bin/env bash
# Make .venv and install megavlm with everything its tests need: torch first, by itself, so that a machine without an
# NVIDIA driver does not pull gigabytes of CUDA. PYTHON=/path/to/python overrides the search for an interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=$venv/setup.log
torch_version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "setup: error: $*" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 found (looked for: ${PYTHON:-python3.11 python3.12 python3});" \
        "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

logged() {
    if ! "$@" >>"$log" 2>&1; then
        tail -n 40 "$log" >&2
        fail "'$*' failed; the lines above are the end of $log"
    fi
}

pip_install() {
    "$venv/bin/pip" --disable-pip-version-check --quiet install "$@"
}

install_torch() {
    if nvidia-smi -L >/dev/null 2>&1; then
        echo "setup: torch $torch_version with CUDA, because nvidia-smi lists a GPU"
        logged pip_install "torch==$torch_version"
        return
    fi
    echo "setup: torch $torch_version for CPU, because nvidia-smi finds no NVIDIA GPU here"
    # The configured indexes come first: a site that mirrors the CPU wheel need not reach PyTorch's own index.
    pip_install "torch==$torch_version+cpu" >>"$log" 2>&1 ||
        logged pip_install --index-url "$cpu_index" "torch==$torch_version"
}

install_if_soon() {
    # Extras of which only their own tests know: a machine that cannot have one soon does without.
    local extra=$1 name=$2
    if [[ $(uname -sm) != "Linux x86_64" ]] ||
        ! timeout 120 "$venv/bin/pip" --disable-pip-version-check --quiet install --constraint constraints.txt \
            --editable ".[$extra]" >>"$log" 2>&1; then
        echo "setup: without $name, which could not be installed; its tests will be skipped (see $log)"
    fi
}

if [[ ! -x $venv/bin/pip ]]; then
    python=$(find_python)
    rm -rf "$venv"
    mkdir "$venv"
    logged "$python" -m venv "$venv"
elif [[ -n ${PYTHON:-} ]]; then
    echo "setup: keeping the Python of $venv; remove $venv to build it with another"
fi
: >"$log"
install_torch
logged pip_install --constraint constraints.txt --editable '.[dev]'
install_if_soon dali "NVIDIA DALI"  # 270 MB to fetch
install_if_soon energon "Megatron-Energon"
echo "setup: $("$venv/bin/python" -V), everything in $venv"
