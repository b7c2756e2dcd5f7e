#!/usr/bin/env bash
# The real image, with the whole lock, built from nothing on a machine without a GPU, and what works in it there.
#
# BASE_IMAGE names the base (scripts/docker-base makes the default one). Writes benchmarks/results/image/full-image.log
# and removes the image (10 GB) again unless KEEP=1.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${BASE_IMAGE:-moefix-test-base:bookworm}
image=moefix-full:wheel
log=benchmarks/results/image/full-image.log
mkdir -p "$(dirname "$log")"
build_log=$(mktemp)
trap 'rm -f "$build_log"' EXIT

measure() {
    echo "# benchmarks/full_image.sh, $(date -u +%Y-%m-%d), revision $(git rev-parse --short HEAD)"
    echo "# $(nproc) cores, Docker $(docker version --format '{{.Server.Version}}'), base image $base, no GPU"
    echo
    echo "## docker build, SGLANG_SOURCE=wheel, nothing cached"
    began=$(date +%s)
    TAG=$image DOCKER_BUILDKIT=0 scripts/build-image --no-cache --build-arg "BASE_IMAGE=$base" \
        --build-arg SGLANG_SOURCE=wheel --build-arg PIP_CERT=/etc/ssl/certs/ca-certificates.crt >"$build_log" 2>&1 ||
        { tail -n 50 "$build_log"; return 1; }
    grep -E '^(Step|Successfully|ok |warning |sm_)' "$build_log" | cut -c1-400
    echo "took $(($(date +%s) - began)) s, load average $(cut -d' ' -f1-3 /proc/loadavg)"
    echo
    echo "## layers, in bytes"
    docker history --human=false --no-trunc --format '{{.Size}} {{.CreatedBy}}' "$image" |
        sed -E 's#\|[0-9]+ .*/bin/sh -c ##; s#/bin/sh -c ##' | awk '$1 > 0' | cut -c1-160
    docker image inspect --format 'whole image {{.Size}}' "$image"
    echo
    echo "## what is installed"
    within sh -c 'python3 --version; pip check; echo "$(pip list --format=freeze | wc -l) packages"'
    echo
    echo "## imports (sgl_kernel wants libcuda.so.1, which comes with a GPU)"
    within python3 -W ignore -c '
import importlib
for name in ("sglang", "torch", "triton", "transformers", "flashinfer", "sglang.srt.server_args", "sglang.launch_server",
             "sglang.srt.layers.moe.fused_moe_triton", "sglang.srt.managers.scheduler", "sglang.srt.models.qwen3_moe",
             "sglang.srt.entrypoints.http_server", "sgl_kernel"):
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", ""), "ok")
    except ImportError as fault:
        lines = str(fault).splitlines()
        print(name, "no:", next((line.strip() for line in lines if "libcuda" in line), lines[0])[:160])
'
    within sh -c 'python3 -W ignore -m sglang.launch_server --help 2>/dev/null | head -n 1'
    echo
    echo "## moefix plan, as user 12345, read-only, without a network"
    docker run --rm --network none --read-only --user 12345:12345 "$image" plan \
        --model RedHatAI/Qwen3-30B-A3B-FP8-dynamic --gpu "RTX 4090"
}

within() {
    local program=$1
    shift
    docker run --rm --network none --entrypoint "$program" "$image" "$@" 2>&1
}

measure | tee "$log"
# The classic builder also leaves the stage that it went through without need.
[ "${KEEP:-0}" = 1 ] || {
    docker image rm "$image"
    docker image prune --force --filter label=moefix.sglang.commit
} >/dev/null
