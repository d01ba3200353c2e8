#!/usr/bin/env bash
# Trains in one process: bash train.sh --datasets=panda -c=config/feat/fm_panda.yaml ...
# All arguments go to main.py, and its exit status comes back.
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/utils/launch.sh"

exec "$python" "$here/main.py" "$@"
