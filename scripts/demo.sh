#!/usr/bin/env bash
# Every trainer in miniature, on a CPU: demo data, tiny checkpoints, training with an interruption, use of the result.
#   bash scripts/demo.sh
#   bash scripts/demo.sh --only gaussian_refiner
# Writes runs/demo, with report.html for a browser; what was there before is removed. As many parts run at a time as there
# are cores, one thread each; --jobs says otherwise. About 16 minutes of processor time, which the cores share, after the
# installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
free_mb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') * 1024 / 1000000))
if [ "$free_mb" -lt 1000 ]; then
    echo "error: $PWD has $free_mb MB of free disk space; the demo writes 1000 MB into runs/demo" >&2
    exit 1
fi
exec .venv/bin/python scripts/demo.py "$@"
