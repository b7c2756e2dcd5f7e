"""docker/lock: what pyproject.toml and fixer/sglang_tree.py ask for, with hashes, and as the Dockerfile has it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fixer
from fixer.sglang.releases import PINNED, RELEASES

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("tools", "triton", "torch", "sglang-needs", "sglang", "moefix")
ENVIRONMENTS = [
    {"python_version": python, "python_full_version": f"{python}.4", "platform_machine": machine, "extra": ""}
    | {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython"}
    | {"platform_python_implementation": "CPython"}
    for python, machine in itertools.product(("3.11", "3.12", "3.13"), ("x86_64", "aarch64"))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """The file's requirements and their hashes. Every line that is no comment is part of one."""
    text = "\n".join(
        line for line in (ROOT / "docker" / "lock" / f"{name}.lock").read_text().splitlines() if line[0] != "#"
    )
    found = []
    for entry in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        found.append((Requirement(requirement), [digest.strip() for digest in hashes]))
    return found


def versions(name: str, environment: dict[str, str]) -> dict[str, str]:
    """What an image with that Python and processor gets, by name."""
    pins: dict[str, str] = {}
    for requirement, _ in locked(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert pins.setdefault(canonicalize_name(requirement.name), pin.version) == pin.version
    return pins


def dockerfile_argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return str(value)


def wanted(requirements: list[str], environment: dict[str, str]) -> list[Requirement]:
    parsed = map(Requirement, requirements)
    return [one for one in parsed if one.marker is None or one.marker.evaluate(environment)]


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_has_hashes_and_an_exact_version(name):
    entries = locked(name)
    assert entries
    for requirement, hashes in entries:
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement
        assert [specifier.operator for specifier in requirement.specifier] == ["=="]
        assert requirement.url is None


@pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda one: f"{one['python_version']}-{one['platform_machine']}"
)
def test_it_holds_what_the_project_asks_for_and_no_version_twice(environment):
    pins = {name: versions(name, environment) for name in LOCKS}
    together: dict[str, str] = {}
    for name in LOCKS:
        for package, version in pins[name].items():
            assert together.setdefault(package, version) == version, f"{name}.lock and another disagree on {package}"

    for requirement in wanted(PROJECT["project"]["dependencies"], environment):
        assert Version(pins["moefix"][canonicalize_name(requirement.name)]) in requirement.specifier
    for requirement in wanted(PROJECT["build-system"]["requires"], environment):
        assert Version(pins["tools"][canonicalize_name(requirement.name)]) in requirement.specifier
    assert pins["sglang"] == {"sglang": PINNED}
    assert pins["triton"] == {"triton": RELEASES[PINNED].triton}
    assert pins["torch"]["triton"] == RELEASES[PINNED].triton
    assert pins["sglang-needs"].items() >= pins["torch"].items()
    assert {"transformers", "flashinfer-python", "sglang-kernel"} <= set(pins["sglang-needs"])
    assert {"pip", "setuptools", "wheel", "setuptools-scm", "setuptools-rust"} <= set(pins["tools"])


def test_sglangs_wheel_is_the_one_that_moefix_plans_with():
    ((_, hashes),) = locked("sglang")
    assert f"sha256:{RELEASES[PINNED].wheel_sha256}" in hashes
    assert len(hashes) == 8  # Python 3.10 to 3.13, each for two processors


def test_the_dockerfile_has_the_same_versions():
    assert dockerfile_argument("SGLANG_VERSION") == PINNED
    assert dockerfile_argument("TRITON_VERSION") == RELEASES[PINNED].triton
    assert dockerfile_argument("MOEFIX_VERSION") == fixer.__version__
    assert re.fullmatch(r"[0-9a-f]{40}", dockerfile_argument("SGLANG_COMMIT"))
