# moefix on top of SGLang. For the classic builder and for BuildKit, on x86-64 and arm64.
#
#   docker build -t moefix .
#   docker build -t moefix --build-arg SGLANG_SOURCE=wheel .      # SGLang from PyPI: no compiling
#
# Layers, from seldom to often changed: system, torch and Triton, SGLang, what moefix needs, moefix.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE_IMAGE}

# A CA bundle in the base image, for networks with a certificate of their own. Build time only.
ARG PIP_CERT=
ARG DEBIAN_FRONTEND=noninteractive

# Triton and SGLang compile at run time: the C and C++ compilers and Python's headers stay.
RUN apt-get update -q \
    && apt-get install -q -y --no-install-recommends \
        ca-certificates curl g++ gcc git libc6-dev libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment of its own: the system's Python refuses pip (PEP 668). setuptools builds moefix without isolation.
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv \
    && python3 -m pip install --no-cache-dir --upgrade 'pip>=25' 'setuptools>=77,<82' wheel

# WITH_CUDA=0 leaves out torch and all that SGLang needs to serve: enough for plans and for tests.
ARG WITH_CUDA=1
ARG TORCH_VERSION=2.11.0
ARG TRITON_VERSION=3.6.0
RUN if [ "$WITH_CUDA" = 1 ]; then torch="torch==$TORCH_VERSION"; fi \
    && python3 -m pip install --no-cache-dir $torch "triton==$TRITON_VERSION"

# git: the release's tag, installed editable. wheel: the same release from PyPI. SGLANG_COMMIT refuses a moved tag.
ARG SGLANG_VERSION=0.5.17
ARG SGLANG_SOURCE=git
ARG SGLANG_REPOSITORY=https://github.com/sgl-project/sglang.git
ARG SGLANG_COMMIT=
COPY docker/install-sglang /opt/install-sglang
RUN /opt/install-sglang

# What moefix needs, read from pyproject.toml alone, so that a change of its code does not come here.
COPY pyproject.toml /opt/needs/
RUN python3 -c 'import tomllib; print(*tomllib.load(open("/opt/needs/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        >/opt/needs/requirements.txt \
    && echo "triton==$TRITON_VERSION" >/opt/needs/constraints.txt \
    && python3 -m pip install --no-cache-dir -r /opt/needs/requirements.txt -c /opt/needs/constraints.txt

# One volume for all that is kept. Any --user can write it: with group 0, with its own, without a passwd entry.
RUN mkdir -p /data && chgrp 0 /data && chmod 0777 /data
ENV MOEFIX_IMAGE=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton
VOLUME /data
# Also the last place where Python looks for a temporary folder: with --read-only it is the one that can be written.
WORKDIR /data

COPY pyproject.toml README.md LICENSE entrypoint.py /opt/moefix/
COPY fixer /opt/moefix/fixer
# The label's version is the code's.
ARG MOEFIX_VERSION=0.1.0
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --editable /opt/moefix \
    && python3 -m compileall -q /opt/moefix \
    && [ "$(moefix --version)" = "moefix $MOEFIX_VERSION" ]

ARG BASE_IMAGE
ARG MOEFIX_SOURCE=
ARG MOEFIX_REVISION=
LABEL org.opencontainers.image.title=moefix \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=$MOEFIX_SOURCE \
      org.opencontainers.image.version=$MOEFIX_VERSION \
      org.opencontainers.image.revision=$MOEFIX_REVISION \
      org.opencontainers.image.base.name=$BASE_IMAGE \
      moefix.sglang.version=$SGLANG_VERSION \
      moefix.sglang.source=$SGLANG_SOURCE \
      moefix.sglang.repository=$SGLANG_REPOSITORY \
      moefix.sglang.commit=$SGLANG_COMMIT \
      moefix.triton.version=$TRITON_VERSION

ENTRYPOINT ["python3", "/opt/moefix/entrypoint.py"]
