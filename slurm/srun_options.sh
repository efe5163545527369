# shellcheck shell=bash
# Sourced by the scripts of this folder: `options`, what every srun is given for the environment of EM_ENVIRONMENT.
options=(--ntasks-per-node=1 --cpu-bind=none)
case ${EM_ENVIRONMENT:-} in
    pyxis:*)
        options+=(--container-image="${EM_ENVIRONMENT#pyxis:}" --container-mounts="$PWD${EM_MOUNTS:+,$EM_MOUNTS}")
        options+=(--container-workdir="$PWD")
        ;;
esac
# shellcheck disable=SC2206  # words are wanted
options+=(${EM_SRUN:-})
