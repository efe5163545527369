#!/usr/bin/env bash
# What every batch script of this folder does: checks the nodes, runs a script on all of them, survives.
# usage (inside a batch script): exec slurm/job.sh SCRIPT.py [argument ...] [--then SCRIPT.py [argument ...]]
#
# SIGUSR1, which Slurm sends before the time limit (#SBATCH --signal=B:USR1@300): all ranks save, and the job is queued
# again. SIGTERM, at the begin of a preemption's grace time or when the job is cancelled: all ranks save, and Slurm does
# what it is about to do. A launch that fails is started again in this job, EM_MAX_RESTARTS times without progress. A node
# that dies: Slurm itself queues the job again (#SBATCH --requeue). Every start goes on from the newest whole checkpoint.
#
# EM_MAX_RESTARTS   failed starts in a row without a new checkpoint before the job fails (default 3)
# EM_MAX_IDLE       ends by SIGUSR1 in a row without a new checkpoint before the job fails (default 3)
# EM_GRACE_SECONDS  time for Slurm to end or requeue this job after a SIGTERM, before it requeues itself (default 120)
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
# The name of this job alone: the number of an array's last task also stands for the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
EM_HEAD_NODE=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
[ -n "$EM_HEAD_NODE" ] || fail "scontrol names no head node for the nodes '${SLURM_JOB_NODELIST:-}' of this job"
mkdir -p .slurm || fail "a folder cannot be made in $PWD: submit from a folder that the nodes may write to"
EM_OUTCOME_FILE=$PWD/.slurm/$SLURM_JOB_ID
EM_LAUNCH=0
export EM_HEAD_NODE EM_OUTCOME_FILE EM_LAUNCH
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -f "$EM_OUTCOME_FILE.progress" "$EM_OUTCOME_FILE.idle" # of an older job of this number
# shellcheck disable=SC1091
. "$here/srun_options.sh"
options+=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --kill-on-bad-exit=1)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

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
    [ "$asked" = 0 ] || kill -USR1 "$pid" 2>/dev/null # it came before there was a pid
    while :; do
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    pid=
}

newest() { cat "$EM_OUTCOME_FILE.progress" 2>/dev/null || echo 0; }
state() { scontrol -o show job "$job" 2>/dev/null; }

# Whether Slurm is about to end this job: it was cancelled, or its place goes to another one.
ending() {
    [ "$terminated" = 0 ] || return 0
    case $(state) in
        *PreemptTime=[0-9]*) return 0 ;;
        *JobState=RUNNING* | '') return 1 ;;
        *) return 0 ;;
    esac
}

requeue() {
    say "asking Slurm to run this job again"
    scontrol requeue "$job" || fail "this job could not be queued again: submit it once more, it goes on where it stopped"
    sleep 60 # Slurm ends this script
    exit 1
}

# After a SIGTERM: a cancelled job ends; one that is preempted must not end by itself, or Slurm would not queue it again.
wait_for_slurm() {
    say "SIGTERM: waiting for what Slurm does with this job"
    local waited
    for ((waited = 0; waited < ${EM_GRACE_SECONDS:-120}; waited++)); do
        case $(state) in
            *JobState=RUNNING* | '') sleep 1 ;; # or the controller does not answer
            *) exit 0 ;;
        esac
    done
    requeue # a long grace time
}

check_nodes() {
    [ "${EM_HEALTH_CHECK:-1}" != 0 ] || return 0
    local arguments=(--output "$PWD")
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || arguments+=(--expected-gpus "$SLURM_GPUS_ON_NODE")
    launch launch/health_check.py "${arguments[@]}"
    [ "$code" != 0 ] && [ "$asked" = 0 ] || return 0
    ! ending || wait_for_slurm
    fail "the nodes are not fit, see above: exclude one with sbatch --exclude=NODE"
}

# Starts a script until it is done; returns when it is, or when Slurm has asked for an end.
run() {
    local failures=0 outcome reached before idle
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
                ! ending || wait_for_slurm
                [ "$(newest)" = "$before" ] || failures=0
                failures=$((failures + 1))
                [ "$failures" -le "${EM_MAX_RESTARTS:-3}" ] || fail "gave up after $failures failed starts without progress"
                say "starting again (failure $failures without a new checkpoint)"
                check_nodes
                ;;
        esac
    done
    # Asked to end again and again before there is anything to go on from: the time limit is too short.
    idle=$(cat "$EM_OUTCOME_FILE.idle" 2>/dev/null || echo 0)
    if [ "$(newest)" = "$at_start" ]; then idle=$((idle + 1)); else idle=0; fi
    echo "$idle" >"$EM_OUTCOME_FILE.idle"
    [ "$idle" -le "${EM_MAX_IDLE:-3}" ] || fail "this job was asked to end $idle times before it had anything new to go \
on from: give it more time (sbatch --time), or have its signal sent later (--signal=B:USR1@SECONDS)"
    requeue
}

say "job $job on $SLURM_NNODES nodes, head node $EM_HEAD_NODE, restart ${SLURM_RESTART_COUNT:-0}"
check_nodes
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
