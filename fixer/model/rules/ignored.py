"""Which layers a checkpoint leaves unquantised, matched as SGLang matches names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from fixer.base.errors import ModelError
from fixer.model.rules.scheme import Question
from fixer.model.rules.values import read_mapping

MAX_IGNORED = 1 << 16
"""Longest list of unquantised modules that is read."""


MAX_PATTERNS = 512
"""Most patterns in such a list that are tried."""


class Match(Enum):
    """How a method compares a list of unquantised modules with a module's name."""

    PATH = "whole dotted parts (utils.py:48-59)"
    SUBSTRING = "anywhere in the name (awq/awq.py:60)"
    NAME = "the whole name, its end, or a re: pattern (compressed_tensors/utils.py:79)"
    WILDCARD = "a shell pattern (modelopt_quant.py)"


_IGNORE_FIELDS: Mapping[Match, tuple[str, ...]] = {
    Match.PATH: ("ignored_layers", "modules_to_not_convert"),
    Match.SUBSTRING: ("modules_to_not_convert",),
    Match.NAME: ("ignore", "exclude", "exclude_layers"),
    Match.WILDCARD: ("exclude_modules", "ignore"),
}


def ignored(config: Mapping[str, Any] | None, match: Match, names: tuple[str, ...]) -> bool:
    """Whether a module, of which `names` are the possible spellings, is left unquantised.

    Raises:
        ModelError: the list is too long or holds something that is no text.
    """
    entries = _ignore_list(config or {}, match)
    patterns = 0
    for entry in entries:
        patterns += entry.startswith("re:") or "*" in entry
        if patterns > MAX_PATTERNS:
            raise ModelError(f"config.json: more than {MAX_PATTERNS} patterns of unquantised modules")
        if any(matches(entry, name, match) for name in names):
            return True
    return False


def _ignore_list(config: Mapping[str, Any], match: Match) -> tuple[str, ...]:
    for body in (config, read_mapping(config.get("quantization"))):
        for field in _IGNORE_FIELDS[match]:
            entries = body.get(field)
            if entries is None:
                continue
            if not isinstance(entries, (list, tuple)) or len(entries) > MAX_IGNORED:
                raise ModelError(f"config.json: {field} of the quantisation is no list of module names")
            if not all(isinstance(entry, str) for entry in entries):
                raise ModelError(f"config.json: {field} of the quantisation holds something that is no text")
            return tuple(entries)
    return ()


def matches(entry: str, name: str, match: Match) -> bool:
    """Whether an entry of a list of unquantised modules names this module."""
    if not entry:
        return False
    if match is Match.SUBSTRING:
        return entry in name
    if match is Match.WILDCARD:
        return _wildcard(entry, name)
    if match is Match.NAME:
        if entry.startswith("re:"):
            return safe_match(entry[3:], name)
        return entry == name or name.endswith("." + entry)
    bare = entry.rstrip(".").removeprefix("model.")
    # An entry for single experts or projections counts for the fused module (utils.py:115-122).
    return f".{bare}." in f".{name}." or ("experts" in entry and name in f"model.{bare}")


def _wildcard(entry: str, name: str) -> bool:
    """A shell pattern; `fnmatch` turns it into a regular expression, so its stars are bounded."""
    if entry.count("*") > 4 or len(entry) > 256:
        return False
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}." or fnmatchcase(name, entry + ".*")


def safe_match(pattern: str, name: str) -> bool:
    """`re.match` for a pattern out of an untrusted config.json: what could take exponential time matches nothing."""
    repeats = sum(pattern.count(sign) for sign in "*+{")
    if len(pattern) > 256 or len(name) > 256 or repeats > 4 or re.search(r"\)[*+{?]|\\[1-9]", pattern):
        return False
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def skips(question: Question, match: Match, suffix: str = "") -> tuple[bool, tuple[str, ...]]:
    """Whether the experts are left unquantised, and a note where not all layers are alike."""
    each = [ignored(question.quant_config, match, tuple(name + suffix for name in names)) for names in question.layers]
    if not any(each):
        return False, ()
    if all(each):
        return True, ()
    return False, ("some layers' experts are left unquantised; moefix plans for the quantised ones",)
