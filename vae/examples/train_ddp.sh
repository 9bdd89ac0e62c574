#!/usr/bin/env bash
# Trains WFVAE-L (317 M parameters, 16 channels) on clips of 25 frames at 256 x 256. Edit the two paths, then run
#   bash examples/train_ddp.sh
# Further flags are passed on and win over those below, e.g. `--resume_from_checkpoint latest` or `--preflight`.
# All GPUs of the machine take part; NUM_PROCESSES says otherwise. On several nodes set NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT on each. The original's first stage took 800,000 steps with a global batch of 8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v torchrun > /dev/null || export PATH="$PWD/../.venv/bin:$PATH"

export WANDB_PROJECT=${WANDB_PROJECT:-WFVAE} # `wandb login` first, or WANDB_MODE=offline, or --report_to tensorboard
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
NODES=(--standalone) # a free port, so that several jobs can share a machine
if [ "${NNODES:-1}" -gt 1 ]; then
    NODES=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-12135}")
fi

exec torchrun "${NODES[@]}" --nproc_per_node "$NUM_PROCESSES" train_ddp.py \
    --exp_name WFVAE \
    --model_name WFVAE \
    --model_config examples/wfvae-large-16chn.json \
    --video_path ../datasets/videos/train \
    --eval_video_path ../datasets/videos/test \
    --resolution 256 \
    --num_frames 25 \
    --sample_rate 1 \
    --batch_size 1 \
    --lr 1e-5 \
    --epochs 4 \
    --disc_start 0 \
    --loss_type l1 \
    --perceptual_weight 1.0 \
    --wavelet_loss \
    --wavelet_weight 0.1 \
    --ema \
    --ema_decay 0.999 \
    --save_ckpt_step 5000 \
    --eval_steps 1000 \
    --eval_batch_size 1 \
    --eval_num_frames 33 \
    --eval_sample_rate 1 \
    --eval_subset_size 1000 \
    --eval_lpips \
    "$@"
