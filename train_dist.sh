#!/usr/bin/env bash
# Trains in N processes of this machine, one per GPU (or on the CPU where there is none):
#   bash train_dist.sh 2 --datasets=panda -c=config/e2e/r18_panda.yaml ...
# Every argument behind N goes to main.py. The status is 75 when the run was asked to stop and has saved (the same
# command goes on), and otherwise not 0 when any process fails.
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if ! [[ "${1:-}" =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "The first argument of train_dist.sh is '${1:-}', but must be the number of processes, 1 or more:" \
        "bash train_dist.sh 2 -c=config/e2e/r18_panda.yaml ..." >&2
    exit 2
fi
processes=$1
shift
source "$here/utils/launch.sh"

# The published 8 threads per process, fewer where the processes would have to share cores.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 8)
share=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 8 ? 8 : share))}"

# Port 0 lets the rendezvous take a free port; the address keeps it off a host name that may not resolve.
exec "$python" "$here/utils/torchrun.py" --nnodes=1 --nproc-per-node="$processes" \
    --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 \
    "$here/main.py" "$@"
