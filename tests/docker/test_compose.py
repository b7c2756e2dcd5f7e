"""compose.yaml, read by the real tool."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import yaml

from tests.docker.engine import ROOT

pytestmark = pytest.mark.docker


def compose(**environ: str) -> subprocess.CompletedProcess[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    tool = ["docker", "compose"] if plugin else [shutil.which("docker-compose") or "docker-compose"]
    command = [*tool, "--file", str(ROOT / "compose.yaml"), "config"]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, env={**kept, **environ}, capture_output=True, text=True, check=False)


def test_a_model_is_all_that_is_needed():
    result = compose(MODEL="Qwen/Qwen3-30B-A3B-FP8", HF_TOKEN="hf_of_the_user")
    assert result.returncode == 0, result.stderr
    service = yaml.safe_load(result.stdout)["services"]["moefix"]
    assert service["command"][:2] == ["--model", "Qwen/Qwen3-30B-A3B-FP8"]
    assert service["environment"] == {"HF_TOKEN": "hf_of_the_user"}
    assert service["ipc"] == "host"
    assert service["restart"] == "unless-stopped"
    assert service["user"] == "0:0"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "30000" in str(service["ports"])
    assert "/.cache/huggingface" in str(service["volumes"])
    assert "~" not in str(service["volumes"])
    assert service["healthcheck"]["test"] == ["CMD", "moefix", "status", "--healthcheck"]
    assert service["healthcheck"]["start_period"] in {"2h", "2h0m0s"}
    assert service["stop_grace_period"] in {"2m", "2m0s"}


def test_what_a_user_may_set():
    environ = {"MODEL": "m", "PORT": "8000", "HF_CACHE": "/mnt/hub", "MOEFIX_USER": "1000:1000"}
    service = yaml.safe_load(compose(**environ).stdout)["services"]["moefix"]
    assert "8000" in str(service["ports"])
    assert "/mnt/hub" in str(service["volumes"])
    assert service["user"] == "1000:1000"
    assert not (service.get("environment") or {}).get("HF_TOKEN")


def test_without_a_model_it_says_what_is_missing():
    result = compose()
    assert result.returncode != 0
    assert "set MODEL" in result.stderr
