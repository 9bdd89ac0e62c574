#!/usr/bin/env bash
# Runs the tests; arguments go to pytest, with paths relative to the repository root.
#   bash scripts/test.sh
#   bash scripts/test.sh tests/common -k checkpoint
#   bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh

# The pytest program, not `python -m pytest`: that would put this folder on sys.path, and with it datasets/, which
# transformers then takes for the package of that name.
export HF_HUB_OFFLINE=1
exec .venv/bin/pytest "$@"
