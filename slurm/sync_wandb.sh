#!/usr/bin/env bash
# Uploads the offline wandb segments of runs, for a node with a network.

set -euo pipefail

usage() {
    cat <<EOF
usage: $(basename "$0") [--list] [--all] RUN_FOLDER ...

Uploads to wandb what offline calls of training runs left in RUN_FOLDER/wandb: a segment for each call, in the order of
their starts, all appended to the one wandb run whose id is in RUN_FOLDER/wandb_id. What was uploaded before is passed
over, so it may be called as often as you like, by cron too. A segment that was written to in the last 5 minutes is
taken for one of a call that still runs, and left for later.

  --list   say what would be uploaded, and upload nothing
  --all    upload segments that were written to just now, too
  --help   this text

It needs an API key (wandb login, or WANDB_API_KEY), and the wandb client in this folder's environment or on the PATH.
EOF
}

refuse() {
    echo "error: $1" >&2
    exit 2
}

# The client of a call that runs writes every 15 seconds.
still_written() {
    [[ -n $(find "$1" -name '*.wandb' -mmin -5) ]]
}

# A file with nothing but its header: the call was killed before the client wrote.
empty() {
    [[ -z $(find "$1" -name '*.wandb' -size +7c) ]]
}

# The client ends with status 0 whatever happens, and leaves a mark beside a file only if it was whole.
upload() {
    local segment=$1 id=$2 said
    said=$("$wandb" sync --id "$id" "$segment" 2>&1) || true
    if compgen -G "$segment/*.wandb.synced" >/dev/null; then
        return 0
    elif [[ $said == *"ends with an incomplete record"* ]]; then
        # The call was killed while its client wrote; all before that has been uploaded.
        touch "$(compgen -G "$segment/*.wandb" | head -n 1).synced"
        return 0
    fi
    printf '%s\nerror: %s was not uploaded\n' "$said" "$segment" >&2
    return 1
}

sync_run() {
    local run=$1 id segment
    [[ -s $run/wandb_id ]] || { echo "error: $run has no wandb_id: give the folder of a run, runs/NAME" >&2; return 1; }
    id=$(<"$run/wandb_id")
    [[ -d $run/wandb ]] || { echo "$run: nothing to upload"; return 0; }
    exec {lock}>"$run/wandb/sync.lock"
    flock -n "$lock" || { echo "$run: an upload is running already"; return 0; }
    # The glob sorts by name, which begins with the time of the start.
    for segment in "$run"/wandb/offline-run-*/; do
        segment=${segment%/}
        if [[ ! -d $segment ]] || compgen -G "$segment/*.wandb.synced" >/dev/null; then
            continue
        elif [[ -z $all ]] && still_written "$segment"; then
            echo "$segment: written to in the last 5 minutes, left for later"
            break
        elif empty "$segment"; then
            continue
        fi
        echo "$segment -> wandb run $id"
        # The next one would come before one that failed.
        [[ -n $list ]] || upload "$segment" "$id" || return 1
    done
}

list="" all="" lock="" runs=()
for argument in "$@"; do
    case $argument in
        --help | -h) usage; exit 0 ;;
        --list) list=yes ;;
        --all) all=yes ;;
        -*) refuse "unknown option $argument: see --help" ;;
        *) runs+=("${argument%/}") ;;
    esac
done
[[ ${#runs[@]} -gt 0 ]] || refuse "no run folder given: see --help"

wandb=$(dirname "$0")/../.venv/bin/wandb
[[ -x $wandb ]] || wandb=$(command -v wandb) || refuse "no wandb client in .venv or on the PATH: make install"

failed=0
for run in "${runs[@]}"; do
    sync_run "$run" || failed=1
done
exit "$failed"
