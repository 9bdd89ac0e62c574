#!/usr/bin/env bash
# Step 2 of the evaluation: compares what step 1 wrote with the originals. Type it in the folder vae, with step 1's settings:
#   METRIC=psnr,ssim,lpips RESOLUTION=256 bash examples/eval.sh
# METRIC is psnr, ssim, lpips, flicker, fvd, several of them, or all; fvd needs --i3d_weights FILE.
# What follows the script's name goes to evaluate.py (`--help` lists all). The last lines say `metric value`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v accelerate >/dev/null || PATH="$here/../.venv/bin:$PATH"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

EXP_NAME=${EXP_NAME:-test}           # as in step 1, like the next four
SAMPLE_RATE=${SAMPLE_RATE:-1}
NUM_FRAMES=${NUM_FRAMES:-33}
RESOLUTION=${RESOLUTION:-256}        # here also the side of the square that is compared
SUBSET_SIZE=${SUBSET_SIZE:-0}
METRIC=${METRIC:-lpips}
GENERATED=video_gen/${EXP_NAME}_sr${SAMPLE_RATE}_nf${NUM_FRAMES}_res${RESOLUTION}_subset${SUBSET_SIZE}
REAL_DATASET_DIR=${REAL_DATASET_DIR:-$GENERATED/origin}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

accelerate launch --config_file "$here/../accelerate_configs/ddp.yaml" \
    --num_processes "$NUM_PROCESSES" --main_process_port 0 --mixed_precision no \
    "$here/evaluate.py" \
    --metric "$METRIC" --real_video_dir "$REAL_DATASET_DIR" --generated_video_dir "$GENERATED" \
    --sample_rate "$SAMPLE_RATE" --num_frames "$NUM_FRAMES" --resolution "$RESOLUTION" --crop_size "$RESOLUTION" \
    --subset_size "$SUBSET_SIZE" "$@"
