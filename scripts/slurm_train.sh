#!/usr/bin/env bash
# Trains on several machines of a Slurm cluster: one launcher per machine, one process per GPU. After the options of sbatch come
# the script of the guide, its path from the repository root, and its arguments:
#   sbatch scripts/slurm_train.sh scripts/train.py config=configs/nova_d48w1024_sdxl1024.yaml pipeline.paths.pretrained_path=/shared/nova train_dataloader.params.dataset=/shared/cache experiment.output_dir=/shared/run
#   sbatch scripts/slurm_train.sh gaussian_refiner/train_repair_cross_attn_version.py --pretrained_model_name_or_path /shared/sd21-unclip --data_json /shared/pairs.json --output_dir /shared/run
#   sbatch scripts/slurm_train.sh mvdiffusion/train_image_variation.py --pretrained_model_name_or_path /shared/sd-image-variations --train_data_dir /shared/renders --output_dir /shared/run
#   sbatch scripts/slurm_train.sh training_ggi/exps/T073-000.py --data_root /shared/dl3dv --output_dir /shared/run
#   sbatch scripts/slurm_train.sh vae/train_ddp.py --model_name WFVAE --model_config vae/examples/wfvae-small-4chn.json --video_path /shared/videos --output_dir /shared/run
#   LAUNCHER_FILE=accelerate_configs/fsdp2.yaml sbatch --nodes 4 scripts/slurm_train.sh training_ggi/exps/T073-000.py --train_mode full --data_root /shared/dl3dv --output_dir /shared/run
# Submit it from the repository root, with the environment active. Output folders and caches must be on a file system that all
# machines share. Before the time limit the run saves, ends and queues itself again, until it is done. Where machines have
# several networks, export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (as ib0) before.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [ ! -f "${1:-}" ]; then
    echo "error: '${1:-}' is no file in $PWD: the first argument is a training script, as vae/train_ddp.py" >&2
    exit 2
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus_per_node=${SLURM_GPUS_PER_NODE:-8} # may read h100:8
export LAUNCHER_FILE=${LAUNCHER_FILE:-accelerate_configs/multi_node.yaml}
export NUM_MACHINES=${#hosts[@]}
export NUM_PROCESSES=$((NUM_MACHINES * ${gpus_per_node##*:}))
export MAIN_PROCESS_IP=${hosts[0]}
export MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine differ, below the ports handed out
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}        # srun does not take it over from sbatch

# Signals. Slurm sends USR1 to this script alone, 300 s before the limit. It must reach the training processes, which save and
# end with status 0, and once only, since a second one ends them at once. The launcher in between would die of USR1, and
# answers TERM by killing after 30 s whatever still saves; so it is passed over. On the way it is USR2, which launcher and
# training processes ignore: some clusters deliver a signal of srun to every process of the job, not to its first alone.
on_each_node='
set -u
script=$1
shift
(
    trap "" USR1 USR2 # the launcher inherits this; a training process sets USR1 anew
    exec accelerate launch --config_file "$LAUNCHER_FILE" \
        --num_machines "$NUM_MACHINES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
        "$script" checkpoint.resume_from_checkpoint=latest "$@"
) &
launcher=$!
stopping=
stop() {
    trap "" USR2 TERM
    stopping=yes
    pkill -USR1 -P "$launcher"
}
trap stop USR2 TERM # TERM comes with scancel and before preemption
status=0
wait "$launcher" || status=$?
if [ -n "$stopping" ]; then # that was the signal, not the end
    status=0
    wait "$launcher" || status=$?
fi
exit "$status"
'

srun_pid=
stopping=
stop() {
    trap '' USR1
    stopping=yes
    [ -z "$srun_pid" ] || kill -USR2 "$srun_pid"
}
trap stop USR1
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$on_each_node" train "$@" &
srun_pid=$!
status=0
wait "$srun_pid" || status=$?
if [ -n "$stopping" ]; then
    status=0
    wait "$srun_pid" || status=$?
    [ "$status" -ne 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
