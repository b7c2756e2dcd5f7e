"""The image under test, built once from a local base: SGLang's wheel, no torch, no CUDA."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.docker.engine import FAKE_TOKEN, IMAGE, ROOT, build, docker


@pytest.fixture(scope="session")
def context(tmp_path_factory) -> Path:
    """A copy of the checkout as a user has it: with a token, a cache and a journal lying about."""
    folder = tmp_path_factory.mktemp("context")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".env").write_text(f"HF_TOKEN={FAKE_TOKEN}\n")
    (folder / "token").write_text(FAKE_TOKEN)
    (folder / "fixer" / "__pycache__").mkdir(exist_ok=True)
    (folder / "fixer" / "__pycache__" / "stale.txt").write_text(FAKE_TOKEN)
    return folder


@pytest.fixture(scope="session")
def image(context) -> str:
    result = build(context, IMAGE)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return IMAGE


@pytest.fixture(scope="session")
def package(image) -> str:
    """SGLang's package folder in the image."""
    code = "import importlib.util as u; print(u.find_spec('sglang').submodule_search_locations[0])"
    return docker("run", "--rm", "--entrypoint", "python3", image, "-c", code).stdout.strip()


@pytest.fixture
def volume():
    name = f"moefix-test-{uuid.uuid4().hex[:12]}"
    docker("volume", "create", name)
    yield name
    docker("volume", "rm", "--force", name)


@pytest.fixture
def container_name():
    name = f"moefix-test-{uuid.uuid4().hex[:12]}"
    yield name
    docker("rm", "--force", "--volumes", name, check=False)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory) -> Path:
    """A model without experts: nothing to tune, the server starts at once."""
    cases = json.loads((ROOT / "tests" / "data" / "lookup-cases.json").read_text())
    folder = tmp_path_factory.mktemp("models") / "dense"
    folder.mkdir()
    config = next(case["config"] for case in cases if case["id"] == "qwen3_8b_bf16_4090")
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, *folder.parents[:2]):  # any user in the container reads it
        path.chmod(0o755)
    return folder
