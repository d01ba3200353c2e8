#!/usr/bin/env bash
# Trains in one process: bash train.sh --datasets=panda -c=config/feat/fm_panda.yaml ...
# Every argument goes to main.py, and so does its exit status come back.
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/utils/launch.sh"

exec "$python" "$here/main.py" "$@"
