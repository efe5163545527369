#!/usr/bin/env bash
# 3B parameters on contexts of 32k tokens, on nodes of 8 GPUs.
# usage: sbatch [--nodes=N ...] slurm/pretrain_3b.sh [section.key=value ...]
#SBATCH --job-name=pretrain_3b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -eu
[ -x slurm/job.sh ] || { echo "error: submit from the top folder of em-megatron" >&2; exit 2; }
exec slurm/job.sh launch/pretrain.py launch/recipes/pretrain_3b.yaml "$@"
