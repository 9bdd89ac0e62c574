#!/usr/bin/env bash
# Step 1 of the evaluation: reconstructs the videos of a folder. Type it in the folder vae; settings come from the environment:
#   DATASET_DIR=test_video CKPT=ckpt RESOLUTION=256 bash examples/gen_video.sh
# What follows the script's name goes to reconstruct.py (`--help` lists all): bash examples/gen_video.sh --lossless
# The same command again continues where it was interrupted.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v accelerate >/dev/null || PATH="$here/../.venv/bin:$PATH"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

EXP_NAME=${EXP_NAME:-test}           # part of the output folder's name
SAMPLE_RATE=${SAMPLE_RATE:-1}        # interval between frames
NUM_FRAMES=${NUM_FRAMES:-33}         # frames of each video, 4 n + 1
RESOLUTION=${RESOLUTION:-256}        # short side in pixels
CKPT=${CKPT:-ckpt}                   # folder of the weights, or of a training run
SUBSET_SIZE=${SUBSET_SIZE:-0}        # only the first so many videos; 0 is all
DATASET_DIR=${DATASET_DIR:-test_video}
MODEL_NAME=${MODEL_NAME:-}           # WFVAE or CausalVAE; empty is what the weights say
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

accelerate launch --config_file "$here/../accelerate_configs/ddp.yaml" \
    --num_processes "$NUM_PROCESSES" --main_process_port 0 --mixed_precision no \
    "$here/reconstruct.py" \
    --from_pretrained "$CKPT" ${MODEL_NAME:+--model_name "$MODEL_NAME"} \
    --real_video_dir "$DATASET_DIR" \
    --generated_video_dir "video_gen/${EXP_NAME}_sr${SAMPLE_RATE}_nf${NUM_FRAMES}_res${RESOLUTION}_subset${SUBSET_SIZE}" \
    --sample_fps 24 --sample_rate "$SAMPLE_RATE" --num_frames "$NUM_FRAMES" --resolution "$RESOLUTION" \
    --subset_size "$SUBSET_SIZE" --output_origin "$@"
