#!/usr/bin/env bash
# Makes .venv with everything that the tests and the demo need, or brings it up to date. Does nothing when it already is.
#   bash scripts/setup_env.sh
#   PYTHON=python3.12 bash scripts/setup_env.sh      another interpreter for a new .venv
#
# torch comes from pip's index like everything else, also on machines without a GPU: the torchvision found there (needed by
# lpips) does not load beside a CPU-only torch. The lower bounds in pyproject.toml keep such a wheel out, should pip be
# configured to find an older one.

# A function in a subshell, so that sourcing this file changes neither the caller's directory nor its shell options.
setup_env() (
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    python=${PYTHON:-python3}

    if ! [ -x .venv/bin/pip ]; then
        if ! command -v "$python" >/dev/null; then
            echo "error: $python not found; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.12" >&2
            exit 1
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: $("$python" --version 2>&1) is too old; Python 3.11 or newer is needed." \
                "Name one: PYTHON=/path/to/python3.12" >&2
            exit 1
        fi
        "$python" -m venv .venv
    fi

    stamp=.venv/installed-for.txt
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') * 1024 / 1000000000))
    if ! [ -e "$stamp" ] && [ "$free_gb" -lt 10 ]; then
        echo "warning: $PWD has $free_gb GB of free disk space; a first installation needs 10 GB" >&2
    fi

    # An editable install maps the package folders that exist when it runs, so a new folder needs a new install as well.
    wanted=$(cksum pyproject.toml && ls -d */__init__.py 2>/dev/null || true)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv (the first time takes some minutes)" >&2
        .venv/bin/pip install --quiet --quiet -e '.[test,demo,tensorboard,render]'
        printf '%s\n' "$wanted" >"$stamp"
    fi
)

setup_env
