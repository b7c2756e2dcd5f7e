"""Every command of the README, in a clean container, word for word; those that need a card or Docker are named here."""

from __future__ import annotations

import re
import shlex
import subprocess
import uuid

import pytest

from tests.docker.engine import BASE, ROOT, docker

pytestmark = pytest.mark.docker

ELSEWHERE = {
    "./scripts/test": "this very run",
    "docker build -t moefix .": "test_image.py and test_git_source.py, from a local base",
    "docker run --gpus all --ipc host -p 30000:30000 -v moefix:/data moefix --model Qwen/Qwen3-30B-A3B-FP8": "a card",
    "docker run --gpus all --ipc host -p 30000:30000 -v moefix:/data me/qwen3:rtx4090": "a card; test_baked_image.py",
    "MODEL=Qwen/Qwen3-30B-A3B-FP8 docker compose up": "a card; test_compose.py",
    "moefix tune --model Qwen/Qwen3-30B-A3B-FP8": "a card",
    "moefix --model Qwen/Qwen3-30B-A3B-FP8 --tp 2": "two cards",
    "moefix bake --model Qwen/Qwen3-30B-A3B-FP8 --tag me/qwen3:rtx4090": "a card; test_baked_image.py",
    'moefix bake --model Qwen/Qwen3-30B-A3B-FP8 --tag me/qwen3:plan --for "RTX 4090"': "Docker; test_baked_image.py",
    "moefix bench --model Qwen/Qwen3-30B-A3B-FP8": "a card",
    "moefix bench --serve --model Qwen/Qwen3-30B-A3B-FP8": "a card",
}
"""Commands that cannot run in a container without a card and without Docker, and where else they run."""

RUN = {
    "python3 -m venv .venv && .venv/bin/pip install -q . triton==3.6.0 && .venv/bin/moefix plan --model RedHatAI/"
    'Qwen3-30B-A3B-FP8-dynamic --gpu "RTX 4090"': "need at most 73728 of 101376 bytes",
    "pip install .": "",
    'moefix plan --model Qwen/Qwen3-30B-A3B-FP8 --gpu "RTX 4090"': "block_shape=[128, 128].json",
    'moefix plan --model Qwen/Qwen3-30B-A3B-FP8 --gpu "RTX 4090" --gpu H100 --lookup-only --json': '"outcome": "asks"',
    "moefix export --list": "artefacts/NVIDIA_",
    "moefix export --model Qwen/Qwen3-30B-A3B-FP8 --as artefact --out qwen3.4090.json": "qwen3.4090.json",
    "moefix import qwen3.4090.json": "NVIDIA_",
    "moefix report": "less time in the MoE layer on average",
    "moefix status": "",
}
"""What is run, in the README's order, and what it must print. Before `export` a tuning of the repository is kept."""


def commands() -> list[str]:
    """The README's commands: its indented lines, less comments and what commands print."""
    lines = re.findall(r"^    (?:\$ )?((?:python3|pip|moefix|docker|MODEL=|\./scripts)\S*(?: .*)?)$", README, re.M)
    found = [line.split("  #")[0].strip() for line in lines]
    return list(dict.fromkeys(line for line in found if not line.startswith("moefix:") and not line.endswith("...")))


README = (ROOT / "README.md").read_text()


def test_every_command_of_the_readme_is_accounted_for():
    assert set(commands()) == {*RUN, *ELSEWHERE}


@pytest.fixture(scope="module")
def clean():
    """A container of the bare base image with the checkout in it, and nothing of this machine's Python."""
    name = f"moefix-readme-{uuid.uuid4().hex[:12]}"
    ca = "/etc/ssl/certs/ca-certificates.crt"
    environ = [
        "--env",
        f"PIP_CERT={ca}",
        "--env",
        f"SSL_CERT_FILE={ca}",
        "--env",
        "PATH=/checkout/.venv/bin:/usr/bin:/bin",
    ]
    docker("run", "--detach", "--name", name, *environ, "--workdir", "/checkout", BASE, "sleep", "3600")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    with subprocess.Popen(
        ["tar", "-C", ROOT, "-c", "--null", "-T", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tar:
        tar.stdin.write(listed)
        tar.stdin.close()
        subprocess.run(["docker", "exec", "-i", name, "tar", "-x", "-C", "/checkout"], stdin=tar.stdout, check=True)
    yield name
    docker("rm", "--force", name)


def inside(name: str, command: str) -> subprocess.CompletedProcess[str]:
    return docker("exec", name, "sh", "-c", command, check=False)


def test_the_commands_do_what_the_readme_says(clean):
    kept = "benchmarks/results/h200/qwen3-30b-a3b-fp8.artefact.json"
    for command in (command for command in commands() if command in RUN):
        if command.startswith("moefix export --list"):
            assert inside(clean, f"moefix import {shlex.quote(kept)}").returncode == 0
        result = inside(clean, command)
        said = result.stdout + result.stderr
        assert result.returncode == 0, (command, said[-2000:])
        assert RUN[command] in said, (command, said[-2000:])
