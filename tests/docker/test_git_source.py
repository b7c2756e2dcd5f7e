"""SGLang from git: a local repository that serves a tag, made from the wheel's files while the tests run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fixer.sglang.find_tree import fetched_tree
from fixer.sglang.releases import PINNED
from tests.docker.engine import IMAGE, build, docker

pytestmark = pytest.mark.docker

TAG = f"v{PINNED}"
GIT_IMAGE = IMAGE.partition(":")[0] + ":git"
OTHER_COMMIT = "0123456789" * 4

# As SGLang's own: the version is that of the tag, and the build leaves it in a file.
FROM_TAG = """
[build-system]
requires = ["setuptools>=61", "setuptools-scm>=8"]
build-backend = "setuptools.build_meta"

[project]
name = "sglang"
dynamic = ["version"]

[tool.setuptools.packages.find]
include = ["sglang*"]

[tool.setuptools_scm]
root = ".."
version_file = "sglang/_version.py"
"""
FIXED = """
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "sglang"
version = "0.5.16"
"""


class Repository:
    """A repository that a test fills, below the folder that the daemon serves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch", "main")

    def git(self, *arguments: str) -> str:
        who = {
            f"GIT_{role}_{part}": "moefix@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")
        }
        environ = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull}
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, pyproject: str) -> str:
        """Commit all files; returns the commit."""
        (self.folder / "python").mkdir(exist_ok=True)
        (self.folder / "python" / "pyproject.toml").write_text(pyproject)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "a tree")
        return self.git("rev-parse", "HEAD")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of the repositories, and the address where git serves them."""
    folder = tmp_path_factory.mktemp("repositories")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    programs = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True).stdout.strip()
    options = ("--listen=127.0.0.1", f"--port={port}", "--reuseaddr", "--export-all", f"--base-path={folder}")
    with subprocess.Popen([f"{programs}/git-daemon", *options]) as daemon:
        until = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert daemon.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        yield folder, f"git://127.0.0.1:{port}"
        daemon.terminate()


@pytest.fixture(scope="module")
def release(served, moefix_home) -> str:
    """A repository with the release's tag, an annotated one as SGLang's, and a branch of that name elsewhere."""
    folder, _ = served
    tree = fetched_tree(PINNED, moefix_home / "cache")
    repository = Repository(folder / "release")
    generated = shutil.ignore_patterns("_version.py", "__pycache__")
    shutil.copytree(tree.package, repository.folder / "python" / "sglang", ignore=generated)
    commit = repository.commit(FROM_TAG)
    repository.git("tag", "--annotate", "--message", "release", TAG)
    repository.git("checkout", "--quiet", "-b", TAG)
    repository.commit(FIXED)
    return commit


def build_from(served, name: str, tag: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    given = {"SGLANG_SOURCE": "git", "SGLANG_REPOSITORY": f"{served[1]}/{name}", **arguments}
    return build(served[2], tag, "--network", "host", **given)


@pytest.fixture(scope="module")
def refused(served, context, image):
    """Builds and returns what the build said, which must have failed."""

    def build_refused(name: str, **arguments: str) -> str:
        result = build_from((*served, context), name, GIT_IMAGE + "-refused", **arguments)
        assert result.returncode != 0
        assert "Successfully tagged" not in result.stdout
        return result.stdout + result.stderr

    return build_refused


def test_the_tag_is_installed_and_its_commit_recorded(served, release, context, image):
    result = build_from((*served, context), "release", GIT_IMAGE, SGLANG_COMMIT=release)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    try:
        labels = json.loads(docker("image", "inspect", GIT_IMAGE).stdout)[0]["Config"]["Labels"]
        assert labels["moefix.sglang.commit"] == release
        assert labels["moefix.sglang.source"] == "git"
        assert labels["moefix.sglang.version"] == PINNED
        assert labels["moefix.sglang.repository"].endswith("/release")
        looks = (
            "cat /opt/sglang.source; git -C /opt/sglang rev-parse HEAD; "
            "python3 -c 'from fixer.sglang.find_tree import installed_tree; print(installed_tree().package)'; "
            "command -v cargo rustc || echo no Rust"
        )
        recorded, head, package, rust = docker(
            "run", "--rm", "--entrypoint", "sh", GIT_IMAGE, "-c", looks
        ).stdout.splitlines()
        assert recorded == f"git {release}"
        assert head == release
        assert package == "/opt/sglang/python/sglang"
        assert rust == "no Rust"
        flags = ("plan", "--model", "Qwen/Qwen3-30B-A3B", "--gpu", "RTX 4090", "--lookup-only", "--json")
        plan = json.loads(docker("run", "--rm", "--network", "none", GIT_IMAGE, *flags).stdout)
        assert PINNED in json.dumps(plan)
    finally:
        docker("image", "rm", GIT_IMAGE)


def test_a_moved_tag_is_refused(refused, release):
    said = refused("release", SGLANG_COMMIT=OTHER_COMMIT)
    assert f"the tag {TAG} is commit {release}, expected {OTHER_COMMIT}: it has moved" in said


def test_a_branch_in_place_of_a_tag_is_refused(served, refused):
    repository = Repository(served[0] / "branch")
    commit = repository.commit(FIXED)
    repository.git("branch", TAG)
    assert f"{TAG} is a branch of {served[1]}/branch, not a tag" in refused("branch", SGLANG_COMMIT=commit)


def test_a_repository_without_the_tag_is_refused(served, refused):
    repository = Repository(served[0] / "untagged")
    commit = repository.commit(FIXED)
    repository.git("tag", "v0.5.16")
    assert f"{served[1]}/untagged has no tag {TAG}" in refused("untagged", SGLANG_COMMIT=commit)


def test_a_tree_of_another_version_is_refused(served, refused):
    repository = Repository(served[0] / "other-version")
    commit = repository.commit(FIXED)
    repository.git("tag", TAG)  # a lightweight one
    said = refused("other-version", SGLANG_COMMIT=commit)
    assert f"the tree says SGLang 0.5.16, expected {PINNED}" in said


def test_a_tree_whose_build_needs_are_not_locked_is_refused(served, refused):
    repository = Repository(served[0] / "other-needs")
    commit = repository.commit(FIXED.replace('"setuptools>=61"', '"setuptools>=61", "hatchling"'))
    repository.git("tag", TAG)
    assert "hatchling" in refused("other-needs", SGLANG_COMMIT=commit)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"SGLANG_COMMIT": ""}, f"SGLANG_COMMIT is not set: give the commit of {TAG}"),
        ({"SGLANG_VERSION": "0.5.18"}, "docker/lock is for another SGLang than 0.5.18"),
    ],
)
def test_what_cannot_be_checked_is_refused(refused, release, arguments, said):
    assert said in refused("release", **{"SGLANG_COMMIT": release, **arguments})


def test_a_repository_that_is_not_there_is_refused(served, refused):
    assert f"{served[1]}/nowhere cannot be read" in refused("nowhere", SGLANG_COMMIT=OTHER_COMMIT)
