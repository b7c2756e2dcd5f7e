"""The README's first command, word for word, on a copy of the repository and in a fresh environment without PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_command() -> str:
    lines = (ROOT / "README.md").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith("    python3 -m venv"))


def test_the_first_command_sets_up_and_plans(tmp_path, moefix_home, trees):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    environment = {**os.environ, "MOEFIX_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    assert trees["0.5.17"].package.is_dir()  # fetched, unless it is here
    # The trees are there already (one wheel's download less); everything else is as on a fresh machine.
    shutil.copytree(moefix_home / "cache" / "trees", tmp_path / "home" / "cache" / "trees")
    result = subprocess.run(
        ["bash", "-c", first_command()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "verdict  fits: SGLang's own configurations need at most 73728 of 101376 bytes" in result.stdout
    assert "does not compile" not in result.stdout
    assert not list((tmp_path / ".venv").glob("lib/*/site-packages/torch"))
