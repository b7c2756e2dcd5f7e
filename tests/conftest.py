"""What several test files need: SGLang's trees and the models of the look-up cases, kept between runs."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fixer.sglang.find_tree import fetched_tree
from fixer.sglang.releases import RELEASES
from fixer.sglang.tree import Tree
from tests.support.lookup_cases import CASES
from tests.support.serving import compiled, driver, machine, no_write_as_root  # noqa: F401 (fixtures for all)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def moefix_home() -> Path:
    """A data folder that stays between runs, with fetched trees and what was compiled (MOEFIX_TEST_HOME names it)."""
    named = os.environ.get("MOEFIX_TEST_HOME")
    home = Path(named) if named else REPOSITORY / ".cache"
    home.mkdir(parents=True, exist_ok=True)
    if not named:
        (home / ".gitignore").write_text("*\n")
    return home


class Trees(Mapping[str, Tree]):
    """All releases that moefix knows, by version; each is fetched when it is asked for, once."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._trees: dict[str, Tree] = {}

    def __getitem__(self, version: str) -> Tree:
        if version not in self._trees:
            self._trees[version] = fetched_tree(version, self._cache)
        return self._trees[version]

    def __iter__(self) -> Iterator[str]:
        return iter(RELEASES)

    def __len__(self) -> int:
        return len(RELEASES)


@pytest.fixture(scope="session")
def trees(moefix_home: Path) -> Trees:
    """The releases that moefix knows, by version."""
    return Trees(moefix_home / "cache")


@pytest.fixture(scope="session")
def cases() -> dict[str, dict[str, Any]]:
    """The look-up cases by id."""
    return {case["id"]: case for case in CASES}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with config.json for each look-up case, by the case's id."""
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        folder = root / case["id"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case["config"]))
    return {case["id"]: root / case["id"] for case in CASES}
