# moefix on top of SGLang. For the classic builder and for BuildKit, on x86-64 and arm64.
#
#   docker build -t moefix .
#   docker build -t moefix --build-arg SGLANG_SOURCE=wheel .      # SGLang from PyPI: no compiling
#   scripts/build-image                                           # the same, with labels of this checkout
#
# Layers, from seldom to often changed: system, torch and Triton, what SGLang needs, SGLang, what moefix needs, moefix.
# All Python comes as wheels with the hashes of docker/lock, which scripts/lock-image writes; a base image brings
# Python 3.11 or 3.12.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# "sha256:...": the base image is this one, whatever its tag says by now.
ARG BASE_DIGEST=
ARG SGLANG_VERSION=0.5.17
# git: the release's tag, installed editable. wheel: the same release from PyPI.
ARG SGLANG_SOURCE=git
ARG TRITON_VERSION=3.6.0

FROM ${BASE_IMAGE}${BASE_DIGEST:+@$BASE_DIGEST} AS needs

# A CA bundle in the base image, for networks with a certificate of their own. Build time only.
ARG PIP_CERT=
ARG DEBIAN_FRONTEND=noninteractive

# Triton and SGLang compile at run time: the C and C++ compilers and Python's headers stay.
RUN apt-get update -q \
    && apt-get install -q -y --no-install-recommends \
        ca-certificates curl g++ gcc git libc6-dev libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment of its own: the system's Python refuses pip (PEP 668). With the build backends of SGLang and moefix.
ENV PATH=/opt/venv/bin:$PATH
COPY docker/lock/tools.lock /opt/lock/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --only-binary :all: --require-hashes --requirement /opt/lock/tools.lock

# WITH_CUDA=0 leaves out torch and all that SGLang needs to serve: enough for plans and for tests.
ARG WITH_CUDA=1
COPY docker/lock/torch.lock docker/lock/triton.lock /opt/lock/
RUN case "$WITH_CUDA" in \
        1) lock=torch ;; \
        0) lock=triton ;; \
        *) echo "WITH_CUDA is '$WITH_CUDA': set it to 1 or 0" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --only-binary :all: --require-hashes --requirement "/opt/lock/$lock.lock"

COPY docker/lock/sglang-needs.lock /opt/lock/
RUN if [ "$WITH_CUDA" = 1 ]; then \
        pip install --no-cache-dir --only-binary :all: --require-hashes --requirement /opt/lock/sglang-needs.lock; \
    fi

COPY docker/lock/sglang.lock /opt/lock/
COPY docker/install-sglang /opt/install-sglang

# One of the two that follow is the final stage's base. The classic builder goes through both: the other does nothing.
FROM needs AS sglang-git
ARG PIP_CERT=
ARG SGLANG_VERSION
ARG SGLANG_SOURCE
ARG SGLANG_REPOSITORY=https://github.com/sgl-project/sglang.git
# What the tag must be. This one is v0.5.17's as public documents have it; it could not be looked up in the repository
# itself where this was written. For another SGLANG_VERSION give its own (git ls-remote REPOSITORY 'refs/tags/v*^{}').
ARG SGLANG_COMMIT=29481685462732237d80d86076d6563e1f658102
ARG RUST_VERSION=1.92.0
RUN /opt/install-sglang git
LABEL moefix.sglang.repository=$SGLANG_REPOSITORY \
      moefix.sglang.commit=$SGLANG_COMMIT

FROM needs AS sglang-wheel
ARG PIP_CERT=
ARG SGLANG_VERSION
ARG SGLANG_SOURCE
RUN /opt/install-sglang wheel

FROM sglang-${SGLANG_SOURCE}
ARG PIP_CERT=

# What moefix needs; where SGLang has brought it already, nothing is done.
COPY docker/lock/moefix.lock /opt/lock/
RUN pip install --no-cache-dir --only-binary :all: --require-hashes --requirement /opt/lock/moefix.lock

# One volume for all that is kept. Any --user can write it: with group 0, with its own, without a passwd entry, which
# is why it has a name here (torch asks for one).
RUN mkdir -p /data && chgrp 0 /data && chmod 0777 /data
ENV MOEFIX_IMAGE=1 \
    USER=moefix \
    HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton
VOLUME /data
# Also the last place where Python looks for a temporary folder: with --read-only it is the one that can be written.
WORKDIR /data

COPY pyproject.toml README.md LICENSE entrypoint.py docker/check_labels.py /opt/moefix/
COPY fixer /opt/moefix/fixer
ARG SGLANG_VERSION
ARG TRITON_VERSION
# The labels' versions are those that are installed.
ARG MOEFIX_VERSION=0.1.0
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable /opt/moefix \
    && python3 -m compileall -q /opt/moefix \
    && python3 /opt/moefix/check_labels.py "moefix=$MOEFIX_VERSION" "sglang=$SGLANG_VERSION" "triton=$TRITON_VERSION"

# What can be checked without a card, one compiled kernel for each architecture included. Leaves nothing behind.
RUN scratch=$(mktemp -d) \
    && HOME=$scratch TRITON_CACHE_DIR=$scratch moefix doctor --build --home "$scratch" \
    && rm -rf "$scratch"

ARG BASE_IMAGE
ARG BASE_DIGEST
ARG SGLANG_SOURCE
ARG MOEFIX_SOURCE=
ARG MOEFIX_REVISION=
LABEL org.opencontainers.image.title=moefix \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=$MOEFIX_SOURCE \
      org.opencontainers.image.version=$MOEFIX_VERSION \
      org.opencontainers.image.revision=$MOEFIX_REVISION \
      org.opencontainers.image.base.name=$BASE_IMAGE \
      org.opencontainers.image.base.digest=$BASE_DIGEST \
      moefix.sglang.version=$SGLANG_VERSION \
      moefix.sglang.source=$SGLANG_SOURCE \
      moefix.triton.version=$TRITON_VERSION

# A first start downloads weights and tunes; the first good answer ends the start period.
HEALTHCHECK --start-period=2h --interval=15s --timeout=10s --retries=4 CMD ["moefix", "status", "--healthcheck"]

ENTRYPOINT ["python3", "/opt/moefix/entrypoint.py"]
