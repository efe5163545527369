#!/usr/bin/env bash
# Encodes texts into shards on nodes without GPUs, with as many workers on each as it has cores. The tasks of an array
# share the work, whenever each of them starts, and take over from those that die. Submitting the same again goes on.
# usage: sbatch [--array=0-31] slurm/tokenize.sh --tokenizer PATH --input TEXTS --output data/NAME [option of tokenizer.encode ...]
#SBATCH --job-name=tokenize
#SBATCH --nodes=1
#SBATCH --gpus-per-node=0
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -eu
[ -x slurm/job.sh ] || { echo "error: submit from the top folder of em-megatron" >&2; exit 2; }
[ $# -ge 1 ] || { echo "error: give --tokenizer, --input and --output, see python -m tokenizer.encode --help" >&2; exit 2; }
# shellcheck disable=SC1091
. slurm/srun_options.sh
exec srun --nodes=1 --ntasks=1 "${options[@]}" slurm/node_entry.sh --python -m tokenizer.encode --workers "$SLURM_CPUS_ON_NODE" --quiet "$@"
