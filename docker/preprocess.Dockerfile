# Sharding only: no torch. Build from the repository root:
#   docker build -f docker/preprocess.Dockerfile -t maskstream-preprocess .
# BASE may be any image with Python 3.11 or newer and its venv module. EXTRAS: e.g. [ray,tiff].
ARG BASE=docker.io/library/python:3.12-slim-bookworm
FROM ${BASE}
ARG EXTRAS=

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv && useradd --create-home --uid 1000 maskstream
WORKDIR /app

# Dependencies first, so that code changes do not reinstall them.
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY shards/__init__.py shards/
COPY shards/console shards/console
COPY preprocess/__init__.py preprocess/
COPY trainer/__init__.py trainer/
RUN pip install --constraint constraints.txt --editable ".${EXTRAS}"

COPY shards shards
COPY preprocess preprocess
COPY configs configs
RUN mkdir /data && chown maskstream /data

USER maskstream
ENTRYPOINT ["python", "preprocess/make_shards.py"]
