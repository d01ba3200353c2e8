# Sourced by train.sh and train_dist.sh: the settings of every run, and which Python runs it (`python`).
# Needs `here`, the folder of the checkout.

export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    python=$CONDA_PREFIX/bin/python
elif [ -x "$here/.venv/bin/python" ]; then
    python=$here/.venv/bin/python
else
    python=python3
fi
if ! command -v "$python" >/dev/null; then
    echo "There is no Python at '$python'. Run make once to make .venv, activate an environment, or set PYTHON." >&2
    exit 2
fi
