#!/usr/bin/env bash
# Held-out loss of a run, by launch/evaluate.py; ranks share the samples.
# usage: sbatch [--nodes=N ...] slurm/evaluate.sh runs/NAME [memory.key=value ...] [--samples N ...]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -eu
[ -x slurm/job.sh ] || { echo "error: submit from the top folder of em-megatron" >&2; exit 2; }
[ $# -ge 1 ] || { echo "error: give a run folder, such as runs/pretrain_1b" >&2; exit 2; }
export EM_HEALTH_CHECK=${EM_HEALTH_CHECK:-0} EM_MAX_RESTARTS=${EM_MAX_RESTARTS:-0}
exec slurm/job.sh launch/evaluate.py "$@"
