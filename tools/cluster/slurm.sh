#!/bin/bash
# Training on two nodes with eight GPUs each, one process a node: sbatch tools/cluster/slurm.sh
# Change the folders and the options of training; they are on a file system that all nodes share.
#SBATCH --job-name=keras-sd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Five minutes before the time is up, the processes are told to save a checkpoint and end.
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

run=${RUN:-/shared/runs/first}
port=${PORT:-29500}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}

more=()
if compgen -G "$run/checkpoint-*" >/dev/null; then
    more=(--resume-from-checkpoint latest)
fi

export KERAS_BACKEND=jax
# shellcheck disable=SC2016  # the number of a process is known in the process
exec srun --label bash -c 'exec python -m keras_sd.train "$@" --process-id "$SLURM_PROCID"' train \
    text-to-image --output-dir "$run" \
    --pretrained-model-name-or-path /shared/models/sd-1.5 --train-data-dir /shared/images \
    --train-batch-size 256 --max-train-steps 10000 --distribution fsdp \
    --coordinator "$first:$port" --num-processes "$SLURM_NTASKS" "${more[@]}"
