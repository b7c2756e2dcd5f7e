"""The documentation against the code: every option, exit code and name in it is there, and none is left out."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import click
import pytest

from fixer import cli
from fixer.base import errors
from fixer.serve import options
from fixer.sglang.releases import KNOWN_RELEASES, PINNED, RELEASES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("**/*.md")])
README = (ROOT / "README.md").read_text()
HOW = (ROOT / "docs" / "how-it-works.md").read_text()
CHECKLIST = HOW.partition("### Supporting a new release: the checklist")[2]


def commands() -> dict[str, click.Command]:
    context = click.Context(cli.main)
    found = {name: cli.main.get_command(context, name) for name in cli.main.list_commands(context)}
    assert all(found.values())
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_a_command_is_in_the_readme(name):
    for parameter in commands()[name].params:
        for spelling in parameter.opts:
            if spelling.startswith("--"):
                assert re.search(rf"{re.escape(spelling)}\b", README), f"{name} {spelling}"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_is_in_the_readme(name):
    assert f"`moefix {name}" in README


def test_moefixs_own_options_are_those_in_the_readme():
    assert set(re.findall(r"--moefix-[a-z][a-z-]*[a-z]", README)) == set(options.OWN_FLAGS)


def exit_codes() -> dict[int, str]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MoefixError)]
    return {kind.exit_code: kind.__name__ for kind in kinds}


def test_the_table_of_exit_codes_is_complete():
    table = README.partition("### Exit codes")[2].partition("\n### ")[0]
    said = {int(code) for row in re.findall(r"^\| ([0-9, ]+) \|", table, re.M) for code in row.split(",")}
    assert said == {0, 130, 143, *exit_codes()}


def names_in_code(text: str) -> set[str]:
    return set(re.findall(r"`(fixer\.[\w.]+)`", text))


@pytest.mark.parametrize("name", sorted(names_in_code(HOW)))
def test_a_name_in_how_it_works_is_there(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return
    pytest.fail(name)


NOT_OF_A_RELEASE = {"LONGEST_PATH"}


def test_the_checklist_names_what_knows_a_release():
    """What differs between releases is in these; a new place of that kind belongs into the checklist."""
    log = (ROOT / "fixer" / "sglang" / "log_lines.py").read_text()
    lists = {"RELEASES", "PINNED", *re.findall(r"^([A-Z][A-Z_]+) = ", log, re.M)} - NOT_OF_A_RELEASE
    named = {name.rpartition(".")[2] for name in names_in_code(CHECKLIST)}
    assert lists <= named, lists - named
    items = [int(number) for number in re.findall(r"^(\d+)\. ", CHECKLIST, re.M)]
    assert items == list(range(1, len(items) + 1))


def test_the_way_of_the_data_names_modules_that_are_there():
    way = HOW.partition("## The way of the data")[2].partition("\n## Compile first")[0]
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", way))
    missing = {name for name in named if not any((root / name).exists() for root in (ROOT / "fixer", ROOT))}
    assert not missing, missing
    picture = way.partition("```text")[2].partition("```")[0]
    rooms = {path.name for path in (ROOT / "fixer").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(re.findall(r"\b(\w+)/", picture))


@pytest.mark.parametrize("version", KNOWN_RELEASES)
def test_a_release_is_in_every_place(version):
    release = RELEASES[version]
    assert f"| {version} | {release.triton} |" in HOW
    assert version in README
    cases = json.loads((ROOT / "tests" / "data" / "lookup-cases.json").read_text())
    if version not in {"0.4.9", PINNED}:  # 0.4.9's cases are in tests/model/rules
        assert all(f"v{version.replace('.', '_')}" in case for case in cases)
    assert version in (ROOT / "tests" / "sglang" / "test_tree.py").read_text()


def test_the_image_and_the_locks_are_made_for_the_pinned_release():
    assert f"ARG SGLANG_VERSION={PINNED}" in (ROOT / "Dockerfile").read_text()
    assert f"ARG TRITON_VERSION={RELEASES[PINNED].triton}" in (ROOT / "Dockerfile").read_text()
    assert f"triton=={RELEASES[PINNED].triton}" in (ROOT / "requirements-test.lock").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        assert path or page.name != "README.md" or anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_a_page_are_there(page):
    named = set(re.findall(r"`((?:benchmarks|docs|tests|scripts|docker|fixer)/[\w./-]+)`", page.read_text()))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing
