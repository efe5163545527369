#!/usr/bin/env bash
# Trains and evaluates variants of a recipe, one array task for each line of a file: NAME [section.key=value ...]
# (separated by blanks, none within).
# usage: sbatch --array=1-6 slurm/compare.sh RECIPE.yaml slurm/variants/memory_size.txt [section.key=value ...]
# launch/compare.py PLAN --variants FILE writes such a file and prints the command.
# EM_EVALUATE   more arguments for launch/evaluate.py, such as '--suite perplexity,corruption'
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#SBATCH --array=1-6
set -eu
[ -x slurm/job.sh ] || { echo "error: submit from the top folder of em-megatron" >&2; exit 2; }
[ $# -ge 2 ] || { echo "error: give a recipe and a file of variants, such as slurm/variants/memory_size.txt" >&2; exit 2; }
recipe=$1 variants=$2
shift 2
[ -r "$variants" ] || { echo "error: $variants cannot be read" >&2; exit 2; }
number=${SLURM_ARRAY_TASK_ID:?submit as an array, such as sbatch --array=1-6 slurm/compare.sh}
line=$(grep -Ev '^[[:space:]]*(#|$)' "$variants" | sed -n "${number}p")
[ -n "$line" ] || { echo "error: $variants has no variant $number" >&2; exit 2; }
read -r name rest <<<"$line"
runs=runs
# shellcheck disable=SC2086  # the line's words are the overrides
for word in "$@" $rest; do
    case $word in output_dir=*) runs=${word#output_dir=} ;; esac
done
# shellcheck disable=SC2086
exec slurm/job.sh launch/pretrain.py "$recipe" "$@" $rest name="$name" --then launch/evaluate.py "$runs/$name" ${EM_EVALUATE:-}
