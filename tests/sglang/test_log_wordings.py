"""The look-up's words, read off trees, against those that moefix knows."""

import re

import pytest

from fixer.sglang.log_lines import WORDING, Said, patterns_for, read_line
from fixer.sglang.log_wordings import wordings_of
from fixer.sglang.lookup import LOOKUP_SOURCES

STAMP = "[2026-11-23 23:48:52 TP0] "


@pytest.mark.parametrize("version", ["0.4.9", "0.5.17", "0.5.23"])
@pytest.mark.parametrize("said", [Said.USING, Said.FALLBACK, Said.DEFAULT, Said.REUSED_UP, Said.DETERMINISTIC])
def test_the_words_are_sglangs(trees, version, said):
    if version == "0.4.9" and said in (Said.REUSED_UP, Said.DETERMINISTIC):
        return  # came later
    package = trees[version].package
    source = next(package / relative for relative in LOOKUP_SOURCES if (package / relative).exists()).read_text()
    assert [words for kind, words in wordings_of(source) if kind is said and WORDING[said].startswith(words)]


RELEASES_WORDS = (
    (Said.USING, "Using MoE kernel config from %s."),
    (Said.FALLBACK, "Config file not found at %s. Fallback to triton version %v and use MoE kernel config from %s."),
    (Said.DEFAULT, "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at %s,"),
    (Said.DETERMINISTIC, "Deterministic inference is enabled, using default MoE kernel config."),
    (
        Said.REUSED_UP,
        "Using MoE kernel config with down_moe=False. Performance might be sub-optimal! Config file not found at %s,",
    ),
    (Said.REUSED_UP, "Down MoE config file not found at %s;"),
)
"""All that `wordings_of` found in the 26 releases from 0.4.6.post5 to 0.5.23; the fifth in 0.5.4.post2 to 0.5.15."""


@pytest.mark.parametrize("words", RELEASES_WORDS)
def test_the_words_of_every_release_are_known(words):
    """The list that counts where there is no tree."""
    path = iter(("/a.json", "/b.json"))
    text = "".join(next(path) if part == "%s" else part for part in re.split("(%s)", words[1].replace("%v", "3.4.0")))
    said = read_line(STAMP + text + " you can").said
    assert said in ((Said.REUSED_UP, Said.NO_DOWN) if words[0] is Said.REUSED_UP else (words[0],))


@pytest.mark.parametrize("version", ["0.4.9", "0.5.17", "0.5.23"])
def test_the_trees_words_are_among_the_known(trees, version):
    package = trees[version].package
    source = next(package / relative for relative in LOOKUP_SOURCES if (package / relative).exists()).read_text()
    found = wordings_of(source)
    assert {Said.USING, Said.DEFAULT} <= {said for said, _ in found}
    assert set(found) <= set(RELEASES_WORDS)


FORM = """
def get_moe_configs(E, N):
    logger.{first}
    log_info_on_rank0(logger, f"Read the tuning file {{config_path}} for rank {{rank}}")
    if a:
        logger.warning_once("No file for the second product: not found at %s, E=%d", down_path, E)
    logger.warning(f"Tuning file {{path}} is missing; took {{other_path}} of {{version}}")
    logger.info("BLOCK_SIZE_M=%d at M=%d", 1, 2)
    print("nothing at %s", path)
def other():
    logger.info(f"Using {{config_path}}")
"""


def test_words_that_no_release_has_yet_are_read_off_the_tree():
    found = wordings_of(FORM.format(first='info("Deterministic inference, no file")'))
    assert set(found) == {
        (Said.DETERMINISTIC, "Deterministic inference, no file"),
        (Said.USING, "Read the tuning file %s "),
        (Said.DEFAULT, "No file for the second product: not found at %s,"),
        (Said.FALLBACK, "Tuning file %s is missing; took %s "),
    }
    patterns = patterns_for(found)
    assert read_line(STAMP + "Read the tuning file /a/b.json for rank 3", patterns).used == "/a/b.json"
    line = read_line(STAMP + "Tuning file /a.json is missing; took /b.json of 3.6", patterns)
    assert (line.said, line.wanted, line.used) == (Said.FALLBACK, "/a.json", "/b.json")
    assert read_line(STAMP + "Using MoE kernel config from /c.json.", patterns).used == "/c.json"  # the known words too


@pytest.mark.parametrize("source", ["", "def f(", "x = 1", "def get_moe_configs(): logger.info(x)", "\0", "(" * 5000])
def test_a_tree_of_an_unknown_form_gives_no_words(source):
    assert wordings_of(source) == ()
