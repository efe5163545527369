#!/usr/bin/env bash
# First job on a new cluster: looks at every node, and at what lies between them; with arguments, then trains.
# usage: sbatch [--nodes=N ...] slurm/debug_multinode.sh [launch/recipes/RECIPE.yaml section.key=value ...]
#SBATCH --job-name=debug_multinode
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:30:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -eu
[ -x slurm/job.sh ] || { echo "error: submit from the top folder of em-megatron" >&2; exit 2; }
export NCCL_DEBUG=${NCCL_DEBUG:-INFO}
# shellcheck disable=SC1091
. slurm/srun_options.sh
srun "${options[@]}" --label slurm/node_entry.sh --python launch/doctor.py
[ $# -ge 1 ] || exec slurm/job.sh
exec slurm/job.sh launch/pretrain.py "$@"
