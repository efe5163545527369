#!/usr/bin/env bash
# Runs on every node of a job, once, started by srun: finds the head node, enters the environment, becomes torchrun.
# usage (by slurm/job.sh): srun [...] slurm/node_entry.sh SCRIPT.py [argument ...]
#        or, for one plain process: srun [...] slurm/node_entry.sh --python [argument of python ...]
#
# EM_ENVIRONMENT   venv:FOLDER (the default, venv:.venv), pyxis:IMAGE (srun has entered it already), apptainer:IMAGE
# EM_HEAD_ADDRESS  address of the head node, where its name does not lead to it from all nodes
# EM_MOUNTS        folders that a container sees beside this one: /data,/scratch
# EM_PORT          rendezvous port on the head node (default: one between 20000 and 29999, by job number)
# EM_NPROC         processes per node (default: the GPUs that Slurm gives, else 1)
# EM_STOP_SECONDS  time a save may take after a signal (default 600)
# EM_ONE_MACHINE   1: nodes may share one machine, so the head node's address may be a loopback one (for tests)
set -euo pipefail

fail() {
    echo "error (${SLURMD_NODENAME:-$(hostname)}): $*" >&2
    sleep 2 # srun ends the step at the first failure, and with it what was printed but not yet passed on
    exit 1
}

: "${SLURM_JOB_ID:?node_entry.sh is started by srun inside a Slurm job: use sbatch slurm/pretrain_1b.sh}"
[ $# -ge 1 ] || fail "node_entry.sh needs a script to run"

# --- environment ---

environment=${EM_ENVIRONMENT:-venv:.venv}
inside=()
case $environment in
    venv:*)
        folder=${environment#venv:}
        [ -x "$folder/bin/python" ] || fail "EM_ENVIRONMENT=$environment: there is no $folder/bin/python on this node: \
make it with 'make install' on a file system that all nodes share"
        PATH=$(cd "$folder" && pwd)/bin:$PATH
        export PATH
        ;;
    pyxis:*) export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} ;; # this checkout, not the image's copy
    apptainer:*)
        command -v apptainer >/dev/null || fail "EM_ENVIRONMENT=$environment: there is no apptainer on this node"
        inside=(apptainer exec --nv --env "PYTHONPATH=$PWD" --bind "$PWD${EM_MOUNTS:+,$EM_MOUNTS}" --pwd "$PWD" "${environment#apptainer:}")
        ;;
    *) fail "EM_ENVIRONMENT=$environment is none of venv:FOLDER, pyxis:IMAGE, apptainer:IMAGE" ;;
esac

if [ "$1" = --python ]; then
    shift
    exec ${inside[@]+"${inside[@]}"} python "$@"
fi

# --- head node: the first of the job, never this one by mistake ---

head_node=${EM_HEAD_NODE:?slurm/job.sh sets EM_HEAD_NODE}
if [ -n "${EM_HEAD_ADDRESS:-}" ]; then
    address=$EM_HEAD_ADDRESS
else
    address=$(getent ahostsv4 "$head_node" | awk 'NR == 1 {print $1}') || true
    [ -n "$address" ] || address=$(getent ahosts "$head_node" | awk 'NR == 1 {print $1}') || true
fi
[ -n "$address" ] || fail "the name of the head node, $head_node, cannot be resolved here: add it to DNS or /etc/hosts, \
or set EM_HEAD_ADDRESS to its address"
case $address in
    127.* | ::1 | localhost*)
        if [ "${SLURM_NNODES:-1}" -gt 1 ] && [ "${SLURMD_NODENAME:-}" != "$head_node" ] && [ "${EM_ONE_MACHINE:-0}" != 1 ]; then
            fail "the head node $head_node resolves to $address here, which is this node itself: mend /etc/hosts, or set \
EM_HEAD_ADDRESS to its address"
        fi
        ;;
esac
port=${EM_PORT:-$((20000 + (16 * SLURM_JOB_ID + ${EM_LAUNCH:-0} % 16) % 10000))}
nproc=${EM_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
[ "$nproc" -ge 1 ] || nproc=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-$nproc} + nproc - 1) / nproc))}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# exec: signals of srun reach only the process that it started.
exec ${inside[@]+"${inside[@]}"} python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$nproc" \
    --master-addr="$address" --master-port="$port" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout="${EM_STOP_SECONDS:-600}" \
    "$@"
