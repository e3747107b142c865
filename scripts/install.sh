#!/usr/bin/env bash
# Makes .venv and installs the pinned packages and ChatLearn into it. A second run sees that all is there and stops.
#
#   bash scripts/install.sh {cpu|cuda|auto} [--dev]
#
# auto takes cuda where nvidia-smi answers. --dev adds the tools of scripts/test.sh.
#   CHATLEARN_TORCH_SOURCE   where pip finds the CPU build of torch: an index (https://download.pytorch.org/whl/cpu)
#                            or a folder with the wheel; not needed where pip is configured to find it
#   CHATLEARN_PYTHON         the Python to use; by default the first of python3, python3.11 ... that fits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly PYTHON=$VENV/bin/python
readonly LOG=$VENV/install.log
# Each stamp holds the fingerprint of what it stands for; UNFINISHED exists while an installation is under way.
readonly STAMP_LOCKED=$VENV/.chatlearn-locked STAMP_DEV=$VENV/.chatlearn-dev STAMP_PROJECT=$VENV/.chatlearn-project
readonly UNFINISHED=$VENV/.chatlearn-unfinished
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

main() {
    local variant=${1:-} dev=${2:-}
    [[ $variant =~ ^(cpu|cuda|auto)$ && ( -z $dev || $dev == --dev ) && $# -le 2 ]] || usage
    [[ $variant != auto ]] || variant=$(variant_of_machine)

    # Two runs at once would install into the same folder: the second one waits and then finds everything done.
    exec 9<scripts/install.sh
    flock 9

    if is_complete "$variant" "$dev"; then
        say "$VENV is complete ($variant${dev:+, with development tools}); nothing to install"
        return
    fi
    check_machine
    prepare_venv "$variant"
    touch "$UNFINISHED"
    stamped "$STAMP_LOCKED" "$(locked_fingerprint "$variant")" || install_locked "$variant"
    [[ -z $dev ]] || stamped "$STAMP_DEV" "$(fingerprint requirements/dev.txt)" || install_dev
    stamped "$STAMP_PROJECT" "$(fingerprint pyproject.toml)" || install_project
    compile_packages
    rm "$UNFINISHED"
    say "done in $SECONDS s, $(du -sh "$VENV" | cut -f1) in $VENV; to use it: source $VENV/bin/activate"
}

usage() {
    sed -n '2,9s/^# \{0,1\}//p' scripts/install.sh >&2
    exit 2
}

say() { printf 'install: %s\n' "$*"; }

fail() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

variant_of_machine() { if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi; }

check_machine() {
    [[ $(uname -s) == Linux && $(uname -m) =~ ^(x86_64|aarch64)$ ]] ||
        fail "ChatLearn runs on Linux on x86_64 or aarch64; this is $(uname -s) on $(uname -m)"
}

# --- what is there already ------------------------------------------------------------------------------------------

fingerprint() { cat "$@" | sha256sum | cut -c1-32; }

# A virtual environment holds its own absolute path, so one that was moved along with the folder is no longer good.
locked_fingerprint() { { echo "$1 $PWD"; cat $(lock_files "$1"); } | fingerprint; }

lock_files() { if [[ $1 == cpu ]]; then echo requirements/torch_cpu.txt requirements/cpu.txt; else echo requirements/cuda.txt; fi; }

stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

is_complete() {
    [[ ! -e $UNFINISHED ]] && stamped "$STAMP_LOCKED" "$(locked_fingerprint "$1")" &&
        stamped "$STAMP_PROJECT" "$(fingerprint pyproject.toml)" &&
        { [[ -z $2 ]] || stamped "$STAMP_DEV" "$(fingerprint requirements/dev.txt)"; }
}

# --- the virtual environment ----------------------------------------------------------------------------------------

prepare_venv() {
    if [[ -e $VENV && ! -e $UNFINISHED && ! -e $STAMP_LOCKED ]]; then
        fail "$PWD/$VENV exists and was not made by this script; move it away and run this again"
    fi
    if [[ -e $UNFINISHED ]]; then
        say "an earlier installation did not finish; starting afresh"
        rm -rf "$VENV"
    elif [[ -e $STAMP_LOCKED ]] && ! stamped "$STAMP_LOCKED" "$(locked_fingerprint "$1")"; then
        say "the pinned packages changed (or this folder moved, or it was another variant); starting afresh"
        rm -rf "$VENV"
    fi
    [[ -e $VENV ]] || make_venv
}

make_venv() {
    local python
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    mkdir "$VENV"
    touch "$UNFINISHED"
    "$python" -m venv "$VENV"
}

find_python() {
    local candidate
    for candidate in ${CHATLEARN_PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "found no Python from 3.11 to 3.14 with the venv module (tried: ${CHATLEARN_PYTHON:-python3, python3.11 to python3.14});" \
        "install one (on Debian or Ubuntu: apt install python3 python3-venv), or set CHATLEARN_PYTHON to its path"
}

fits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

# --- packages -------------------------------------------------------------------------------------------------------

install_locked() {
    [[ $1 == cuda ]] || install_torch_cpu
    say "installing $(grep -c == "requirements/$1.txt") pinned packages ($(download_size "requirements/$1.txt"); some minutes)"
    pip_locked -r "requirements/$1.txt" || fail_with_log "pip could not install requirements/$1.txt"
    check_locked "$1"
    locked_fingerprint "$1" >"$STAMP_LOCKED"
}

download_size() { sed -n 's/^# Download: at most \([0-9]* MB\).*/up to \1 to download/p' "$1"; }

install_torch_cpu() {
    local source=() torch
    torch=$(grep -o '^torch==[^ ]*' requirements/torch_cpu.txt)
    if [[ -d ${CHATLEARN_TORCH_SOURCE:-} || ${CHATLEARN_TORCH_SOURCE:-} == *.html ]]; then
        source=(--find-links "$CHATLEARN_TORCH_SOURCE")
    elif [[ -n ${CHATLEARN_TORCH_SOURCE:-} ]]; then
        source=(--extra-index-url "$CHATLEARN_TORCH_SOURCE")
    fi
    say "installing $torch"
    pip_locked "${source[@]}" -r requirements/torch_cpu.txt || {
        grep -qE 'No matching distribution found for torch' "$LOG" || fail_with_log "pip could not install $torch"
        fail "pip found no $torch, the CPU build, for $("$PYTHON" --version) on $(uname -m);" \
            "set CHATLEARN_TORCH_SOURCE to PyTorch's CPU index or to a folder that holds the wheel, and run this again:" \
            "CHATLEARN_TORCH_SOURCE=https://download.pytorch.org/whl/cpu bash scripts/quickstart.sh"
    }
}

install_dev() {
    say "installing the development tools ($(download_size requirements/dev.txt))"
    pip_locked -r requirements/dev.txt || fail_with_log "pip could not install requirements/dev.txt"
    fingerprint requirements/dev.txt >"$STAMP_DEV"
}

install_project() {
    say "installing ChatLearn itself (editable)"
    # The locked setuptools builds it, so no isolated build environment is downloaded.
    logged "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation -e . ||
        fail_with_log "pip could not install ChatLearn"
    logged "$PYTHON" -c "import chatlearn" || fail_with_log "chatlearn does not import"
    fingerprint pyproject.toml >"$STAMP_PROJECT"
}

# Nothing but the locked files: no dependency is resolved, no source is built, every file has its hash. pip would compile
# to bytecode on one core; compile_packages does it on all.
pip_locked() {
    logged "$PYTHON" -m pip install --quiet --progress-bar off --no-compile --no-deps --only-binary :all: \
        --require-hashes "$@"
}

# A run starts a dozen processes that import the same large packages. Where Python may not write bytecode
# (PYTHONDONTWRITEBYTECODE, as in many containers) each of them would compile all of it again, at every start.
compile_packages() {
    say "compiling the packages to bytecode"
    # Some packages carry files for other versions of Python; that these do not compile is no fault.
    logged "$PYTHON" -m compileall -q -j 0 "$VENV"/lib/python3*/site-packages || true
}

logged() { "$@" >>"$LOG" 2>&1; }

fail_with_log() {
    tail -n 20 "$LOG" >&2
    fail "$1 (the end of $LOG stands above)"
}

# --- does it work ---------------------------------------------------------------------------------------------------

check_locked() {
    say "checking that the set is complete and imports"
    logged "$PYTHON" requirements/check.py installed "$1" || fail_with_log "the installed packages are not the pinned ones"
    logged env VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$PYTHON" - "$1" <<'PYTHON' || fail_with_log "the installed packages do not import"
import sys

import math_verify, pyarrow, ray, torch, transformers, vllm
import torch.distributed.fsdp, transformers.models.qwen3.modeling_qwen3

built_for_cuda = torch.version.cuda is not None
sys.exit(None if built_for_cuda == (sys.argv[1] == "cuda") else f"torch {torch.__version__} is not the {sys.argv[1]} build")
PYTHON
}

main "$@"
