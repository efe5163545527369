#!/bin/sh
# Prints the path of a Python 3.12 that runs and can make virtual environments.
# usage: find_python.sh [PYTHON]   with PYTHON only that one is tried, else what lies in the usual places
set -u

path_of() { # the real executable behind a command, if it is such a Python
    "$1" -c 'import sys, venv, ensurepip
if sys.version_info[:2] != (3, 12): sys.exit(1)
print(sys.executable)' 2>/dev/null
}

if [ -n "${1:-}" ]; then
    path_of "$1" && exit 0
    echo "error: PYTHON=$1 is not a Python 3.12 with the venv module: give the path of one, or leave PYTHON out" >&2
    exit 1
fi

# A command on the PATH may be a pyenv shim for a version that is not there, so each one is run before it is believed.
for command in python3.12 python3 python; do
    path_of "$command" && exit 0
done
for installed in $(ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12*/bin/python 2>/dev/null | sort -rV); do
    path_of "$installed" && exit 0
done
if command -v uv >/dev/null 2>&1; then
    path_of "$(uv python find 3.12 2>/dev/null)" && exit 0
fi
echo "error: no Python 3.12 with the venv module was found: install it, or name one with make PYTHON=/path/to/python3.12" >&2
exit 1
