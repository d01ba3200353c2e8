#!/usr/bin/env bash
# Makes .venv with the packages of requirements.lock; called by make. PYTHON names the interpreter to make it from.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'

base=""
for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$candidate" -c "$fits" 2>/dev/null; then
        base=$candidate
        break
    fi
done
if [ -z "$base" ]; then
    echo "No Python from 3.10 to 3.12 among: ${PYTHON:-python3 python3.12 python3.11 python3.10}." \
        "Install one, name it with make PYTHON=/path/to/python, or activate an environment of your own." >&2
    exit 2
fi

if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $("$base" --version)"
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        echo "$base cannot make a virtual environment (on Debian its venv module is the package python3-venv)." \
            "Install that, or name another Python with make PYTHON=/path/to/python." >&2
        exit 2
    fi
fi

echo "installing the packages of requirements.lock (some 3 GB, torch with its CUDA libraries)"
# PyTurboJPEG 1.x is published as source only; it is pure Python, so nothing is compiled.
.venv/bin/python -m pip install --disable-pip-version-check --only-binary :all: --no-binary pyturbojpeg \
    -r requirements.lock
