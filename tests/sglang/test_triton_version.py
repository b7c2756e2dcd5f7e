"""The Triton of a tree that is not the running installation."""

from __future__ import annotations

import importlib.metadata

import pytest

from fixer.sglang.find_tree import tree_at
from fixer.sglang.releases import RELEASES
from fixer.sglang.triton_version import triton_of


def package_in(folder, version="0.5.20"):
    package = folder / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "version.py").write_text(f'__version__ = "{version}"\n')
    return package.resolve()


@pytest.mark.parametrize(
    ("pins", "triton"),
    [
        ("Requires-Dist: torch==2.9.1\n", "3.5.1"),
        ('Requires-Dist: torch==2.7.1; extra == "srt"\nRequires-Dist: torch; extra == "srt-hip"\n', "3.3.1"),
        ('Requires-Dist: torch==2.8.0\nRequires-Dist: torch==2.9.0; extra == "cu130"\n', "3.4.0"),
        ("Requires-Dist: torchao==2.6.0\nRequires-Dist: torch==2.14.1\n", "3.8.0"),
        ("Requires-Dist: torch==9.9.9\n", "3.7.1"),  # a torch that moefix does not know: the release's own
        ("Name: sglang\n", "3.7.1"),
    ],
)
def test_the_metadata_beside_the_package_says_it(tmp_path, pins, triton):
    package = package_in(tmp_path)
    (tmp_path / "sglang-0.5.20.dist-info").mkdir()
    (tmp_path / "sglang-0.5.20.dist-info" / "METADATA").write_text(pins)
    assert triton_of(package, "0.5.20") == triton


def test_a_checkouts_own_pins(tmp_path):
    package = package_in(tmp_path / "python")
    (tmp_path / "python" / "pyproject.toml").write_text('dependencies = [\n  "torch==2.8.0",\n]\n')
    assert tree_at(tmp_path).triton == "3.4.0"
    assert triton_of(package, "0.0.0.dev1") == "3.4.0"


def test_the_triton_of_the_same_environment_comes_before_all_pins(tmp_path):
    package = package_in(tmp_path)
    for name in ("sglang-0.5.20.dist-info", "triton-3.3.0.dist-info"):
        (tmp_path / name).mkdir()
    (tmp_path / "sglang-0.5.20.dist-info" / "METADATA").write_text("Requires-Dist: torch==2.9.1\n")
    assert triton_of(package, "0.5.20") == "3.3.0"


@pytest.mark.parametrize(("version", "triton"), [("0.5.9", "3.5.1"), ("0.5.19", "3.7.1"), ("0.4.1", "3.2.0")])
def test_without_any_pin_the_release_decides_and_not_what_runs_here(tmp_path, version, triton):
    assert tree_at(package_in(tmp_path, version)).triton == triton


def test_the_running_installation_is_asked_itself(tmp_path, monkeypatch):
    package = package_in(tmp_path, "0.5.9")
    (package / "__init__.py").touch()
    assert tree_at(tmp_path).triton == RELEASES["0.5.9"].triton
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tree_at(tmp_path).triton == importlib.metadata.version("triton")
