#!/usr/bin/env bash
# Trains the refiner on several machines of a Slurm cluster, one launcher per machine, one process per GPU.
#   sbatch scripts/slurm_train.sh --pretrained_model_name_or_path CHECKPOINT --output_dir SHARED/run --train_batch_size 1
#   sbatch --nodes 4 scripts/slurm_train.sh ...
# Submit it from the repository root, with the environment active; arguments go to the trainer. The output folder must be on
# a file system that all machines share. Before the time limit the run saves, ends and queues itself again, until it is done.
#SBATCH --job-name=gaussian_refiner
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

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus_per_node=${SLURM_GPUS_PER_NODE:-8} # may read h100:8
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
(
    trap "" USR1 USR2 # the launcher inherits this; a training process sets USR1 anew
    exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
        --num_machines "$NUM_MACHINES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
        gaussian_refiner/train_repair_cross_attn_version.py --resume_from_checkpoint latest "$@"
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
