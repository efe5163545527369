# em-megatron on NVIDIA's PyTorch image, which brings torch, triton, apex and Transformer Engine built for each other.
#
#   docker build -t em-megatron .
#   docker run --rm --gpus all --ipc=host em-megatron python launch/doctor.py
#   docker run ... --user "$(id -u):$(id -g)" -e HOME=/tmp         (as somebody else than root; HOME holds caches)
#   docker run ... -v "$PWD:/opt/em-megatron"                      (with your checkout in place of the image's copy)
#   enroot import -o em-megatron.sqsh dockerd://em-megatron        (pyxis: EM_ENVIRONMENT=pyxis:em-megatron.sqsh)
#   apptainer build em-megatron.sif docker-daemon://em-megatron:latest
#
# BASE is YEAR.MONTH-py3 and must be 26.04 or newer: the project needs torch >= 2.11, and the torch of 26.02 and 26.03
# calls itself 2.11.0a0, which pip takes for older than 2.11. It must bring Python 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY . /opt/em-megatron
WORKDIR /opt/em-megatron

# Whatever is compiled against the image's CUDA keeps its version; pip stops rather than replace it. The image's own
# constraint file, which pins all packages, is replaced by this one: some of ours must be newer.
RUN compiled='torch|torchvision|triton|pytorch[-_]triton|apex|transformer[-_]engine.*|flash[-_]attn|numpy|nvidia[-_].*' \
    && python -m pip list --format=freeze | grep -iE "^(${compiled})==" | sort >/opt/em-megatron/image.txt \
    && PIP_CONSTRAINT=/opt/em-megatron/image.txt python -m pip install --no-cache-dir --editable . \
    && python -m pip list --format=freeze | grep -iE "^(${compiled})==" | sort | diff /opt/em-megatron/image.txt - \
    && chmod -R a+rX /opt/em-megatron

# Versions only: most of the doctor's page needs the GPU that a build does not have. CHECK=no leaves it out, for bases
# whose Transformer Engine does not import without a driver.
ARG CHECK=yes
RUN if [ "${CHECK}" = yes ]; then python launch/doctor.py --only versions; fi
