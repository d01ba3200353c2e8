# ABMILX on CUDA, with the packages of requirements.lock (all wheels; torch brings its own CUDA libraries).
#
#   docker build -t e2e_abmilx .
#   docker run --gpus all -it --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#       -v /path/to/your_data:/workspace/dataset \
#       -v /path/to/your_output:/workspace/output \
#       e2e_abmilx
#   bash train_dist.sh 2 --dataset_root=/workspace/dataset/... --output_path=/workspace/output/... -c=config/...
#
# --gpus all hands the GPUs in; --ipc=host gives the reading processes and NCCL the shared memory they need (Docker's
# own 64 MB end in "bus error"). To work on your own checkout, add -v /path/to/your_code:/workspace/code.
FROM nvidia/cuda:13.0.2-base-ubuntu22.04

# Ubuntu 22.04 has Python 3.10. libturbojpeg is what PyTurboJPEG loads; without it simplejpeg decodes.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git libturbojpeg make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An active environment: make, train.sh and train_dist.sh use it as it is.
ENV VIRTUAL_ENV=/opt/abmilx
ENV PATH=/opt/abmilx/bin:$PATH
COPY requirements.lock /tmp/requirements.lock
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --only-binary :all: --no-binary pyturbojpeg -r /tmp/requirements.lock \
    && rm /tmp/requirements.lock

WORKDIR /workspace/code
COPY . .
CMD ["/bin/bash"]
