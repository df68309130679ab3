# Training, evaluation and prediction on NVIDIA GPUs (or CPU). Build from the repository root:
#   docker build -f docker/trainer.Dockerfile -t maskstream-trainer .
# The torch wheels include the CUDA libraries; the base image only sets up what the driver mounts need. BASE may be any
# image of Debian or Ubuntu with Python 3.11 or newer in its packages.
ARG BASE=docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv \
    && (! id ubuntu || userdel --remove ubuntu) && useradd --create-home --uid 1000 maskstream
WORKDIR /app

# Dependencies first, so that code changes do not reinstall them.
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY shards/__init__.py shards/
COPY shards/console shards/console
COPY preprocess/__init__.py preprocess/
COPY trainer/__init__.py trainer/
RUN pip install --constraint constraints.txt --editable '.[train]'

COPY shards shards
COPY preprocess preprocess
COPY trainer trainer
COPY configs configs
RUN mkdir /data && chown maskstream /data

USER maskstream
ENTRYPOINT ["/app/entry.sh"]
COPY --chmod=755 docker/entry.sh /app/entry.sh
