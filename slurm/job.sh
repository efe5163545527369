#!/usr/bin/env bash
# What every batch script of this folder does: checks the nodes, runs a script on all of them, survives.
# usage (inside a batch script): exec slurm/job.sh SCRIPT.py [argument ...] [--then SCRIPT.py [argument ...]]
#
# SIGUSR1, which Slurm sends before the time limit (#SBATCH --signal=B:USR1@300): all ranks save, and the job is queued
# again. SIGTERM, at the begin of a preemption's grace time or when the job is cancelled: all ranks save, and Slurm does
# what it is about to do. A launch that fails is started again in this job, EM_MAX_RESTARTS times without progress. A node that dies:
# Slurm itself queues the job again (#SBATCH --requeue). Every start goes on from the newest whole checkpoint.
#
# EM_MAX_RESTARTS   starts without progress before the job fails (default 3)
# EM_HEALTH_CHECK   0: no check of the nodes before the first start and after a failed one
# EM_MOUNTS         folders that a container sees beside this one: /data,/scratch
# EM_SRUN           more options for srun
# and those of slurm/node_entry.sh
set -uo pipefail

say() { echo "[$(date +%T)] $*"; }
fail() {
    echo "error: $*" >&2
    exit 1
}

: "${SLURM_JOB_ID:?this script runs inside a Slurm job: use sbatch slurm/pretrain_1b.sh}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
EM_HEAD_NODE=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
[ -n "$EM_HEAD_NODE" ] || fail "scontrol names no head node for the nodes '${SLURM_JOB_NODELIST:-}' of this job"
mkdir -p .slurm || fail "a folder cannot be made in $PWD: submit from a folder that the nodes may write to"
EM_OUTCOME_FILE=$PWD/.slurm/$SLURM_JOB_ID
EM_LAUNCH=0
export EM_HEAD_NODE EM_OUTCOME_FILE EM_LAUNCH
options=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
mounts=$PWD${EM_MOUNTS:+,$EM_MOUNTS}
case ${EM_ENVIRONMENT:-} in
    pyxis:*) options+=(--container-image="${EM_ENVIRONMENT#pyxis:}" --container-mounts="$mounts" --container-workdir="$PWD") ;;
esac
# shellcheck disable=SC2206  # words are wanted
options+=(${EM_SRUN:-})

asked=0
terminated=0
pid=
trap 'terminated=1' TERM
forward() {
    asked=1
    say "SIGUSR1: asking all ranks to save"
    [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null
}
trap forward USR1

# Runs node_entry.sh on all nodes; a trap ends `wait` early, so it is called until srun has ended.
launch() {
    rm -f "$EM_OUTCOME_FILE"
    EM_LAUNCH=$((EM_LAUNCH + 1))
    srun "${options[@]}" "$here/node_entry.sh" "$@" &
    pid=$!
    while :; do
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    pid=
}

say "job $SLURM_JOB_ID on $SLURM_NNODES nodes, head node $EM_HEAD_NODE, restart ${SLURM_RESTART_COUNT:-0}"
check_nodes() {
    [ "${EM_HEALTH_CHECK:-1}" != 0 ] || return 0
    launch launch/health_check.py --output "$PWD" --expected-gpus "${SLURM_GPUS_ON_NODE:-0}"
    [ "$code" = 0 ] || [ "$asked" = 1 ] || fail "the nodes are not fit, see above: exclude one with sbatch --exclude=NODE"
}
check_nodes

newest() { cat "$EM_OUTCOME_FILE.progress" 2>/dev/null || echo 0; }

# After a SIGTERM: a cancelled job ends; one that is preempted must not, or Slurm would not queue it again.
wait_for_slurm() {
    say "SIGTERM: waiting for what Slurm does with this job"
    for _ in {1..120}; do
        case $(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null) in
            *JobState=RUNNING*) sleep 1 ;;
            *) break ;;
        esac
    done
    exit 0
}

# Starts a script until it is done; returns when it is, or when Slurm has asked for an end.
run() {
    local failures=0 outcome reached before
    while [ "$asked" = 0 ]; do
        before=$(newest)
        launch "$@"
        outcome=failed reached=
        if [ -s "$EM_OUTCOME_FILE" ]; then
            read -r outcome reached <"$EM_OUTCOME_FILE" || true # no newline at its end
        elif [ "$code" = 0 ]; then
            outcome=finished
        fi
        say "launch ended: $outcome${reached:+ at step $reached} (srun's exit code $code)"
        case $outcome in
            finished | paused) return ;;
            refused) exit 2 ;;
            stopped) [ "$asked" = 1 ] || wait_for_slurm ;;
            *)
                [ "$asked" = 0 ] || break # the signal found a process that could not take it yet, or a save that was too slow
                [ "$(newest)" = "$before" ] || failures=0
                failures=$((failures + 1))
                [ "$failures" -le "${EM_MAX_RESTARTS:-3}" ] || fail "gave up after $failures failed starts without progress"
                [ "$terminated" = 0 ] || wait_for_slurm
                say "starting again (failure $failures without a new checkpoint)"
                check_nodes
                ;;
        esac
    done
    # Asked to end again and again before there is anything to go on from: the time limit is too short.
    idle=$(cat "$EM_OUTCOME_FILE.idle" 2>/dev/null || echo 0)
    if [ "$(newest)" = "$at_start" ]; then idle=$((idle + 1)); else idle=0; fi
    echo "$idle" >"$EM_OUTCOME_FILE.idle"
    [ "$idle" -le "${EM_MAX_RESTARTS:-3}" ] || fail "this job was asked to end $idle times before a new checkpoint was \
written: give it more time (sbatch --time), or send its signal later (--signal=B:USR1@SECONDS)"
    say "asking Slurm to run this job again"
    scontrol requeue "$SLURM_JOB_ID" || fail "this job could not be queued again: submit it once more, it goes on where it stopped"
    sleep 60 # Slurm ends this script
    exit 1
}

at_start=$(newest)
command=()
for word in "$@" --then; do
    if [ "$word" = --then ]; then
        [ "${#command[@]}" = 0 ] || run "${command[@]}"
        command=()
    else
        command+=("$word")
    fi
done
