#!/usr/bin/env bash
# Trains in N processes of this machine, one per GPU (or on the CPU where there is none):
#   bash train_dist.sh 2 --datasets=panda -c=config/e2e/r18_panda.yaml ...
# Every argument after N goes to main.py. On several machines, N processes each, run the same command on every one,
# with NNODES (how many), NODE_RANK (this one, from 0), MASTER_ADDR and MASTER_PORT (of machine 0) set; under SLURM
#   srun --ntasks-per-node=1 bash train_dist.sh 4 ...
# sets them. MAX_RESTARTS (0) is how often the run starts again, from its last saved state, when a process dies.
# The status is 75 when the run was asked to stop and has saved (the same command goes on), 2 for a fault in what was
# given, and otherwise not 0 when any process fails. docs/scaling.md has examples.
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
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 8)
share=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 8 ? 8 : share))}"

# CUDA's streams share eight queues of the device unless told otherwise, and in a shared one a kernel waits for the work
# of another stream: beside the GPU's JPEG decoder, which has many, a step of two processes took 5 % longer.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"

exec "$python" "$here/utils/torchrun.py" --nproc-per-node="$processes" "$here/main.py" "$@"
