#!/usr/bin/env bash
# Every trainer in miniature, on a CPU: demo data, tiny checkpoints, training with an interruption, use of the result.
#   bash scripts/demo.sh
#   bash scripts/demo.sh --only gaussian_refiner
# Writes runs/demo, with report.html for a browser; what was there before is removed. About 16 minutes on 2 cores, after
# the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
exec .venv/bin/python scripts/demo.py "$@"
