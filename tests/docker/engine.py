"""Docker's command line, and how the tests build the image."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = os.environ.get("MOEFIX_TEST_BASE", "moefix-test-base:bookworm")
IMAGE = os.environ.get("MOEFIX_TEST_IMAGE", "moefix-test:wheel")
CAPTURED = {"capture_output": True, "text": True, "timeout": 900}
FAKE_TOKEN = "hf_ThisIsNoTokenButMustNotBeInAnyLayer"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def docker(*arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(["docker", *arguments], check=False, **CAPTURED, **options)
    assert not check or result.returncode == 0, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def build_options(**arguments: str) -> list[str]:
    """The build arguments that all tests share, with others over them."""
    values = {
        "BASE_IMAGE": BASE,
        "SGLANG_SOURCE": "wheel",
        "WITH_CUDA": "0",
        "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt",
        **arguments,
    }
    return [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]


def build_environment() -> dict[str, str]:
    """The classic builder's, with a token that must not get into the image."""
    return {**os.environ, "DOCKER_BUILDKIT": "0", "HF_TOKEN": FAKE_TOKEN}


def build(context: Path, tag: str, *options: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    """Build the image from the local base."""
    given = build_options(**{"MOEFIX_REVISION": REVISION, **arguments})
    return docker("build", "--tag", tag, *given, *options, str(context), check=False, env=build_environment())
