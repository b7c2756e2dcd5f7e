"""Which of the user's flags hold a secret: what the server's own list of flags calls a key, a password, a token.

Such a flag is never baked into an image, never passed to a server that only moefix asks, and never shown.
Abbreviations, `--flag=value` and a --config file are seen through, since the words are read as SGLang reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fixer.sglang.declared import Declared
from fixer.sglang.flags import known_flags
from fixer.sglang.parser import Given, read_words
from fixer.sglang.words import server_words

# --ssl-keyfile is a file's name; --speculative-token-map and --max-total-tokens are about tokens of text.
_NAME = re.compile(
    r"(^|_)(key|keys|apikey|password|passwd|passphrase|secret|secrets|credential|credentials)(_|$)|_token$"
)

# In a JSON value: {"secret_access_key": ...}, {"apiKey": ...}; not {"eos_token": ...} or {"max_tokens": ...}.
_JSON_NAME = re.compile(
    r"secret|passw|passphrase|credential|(api|access|private|auth|encryption|account)[_-]?key|(^|[_-])key$"
    r"|^token$|(auth|access|api|hf|hub|bearer|refresh|session|security)[_-]?token$|authorization",
    re.IGNORECASE,
)


def secret_flags(argv: Sequence[str], declared: Declared | None = None) -> tuple[str, ...]:
    """The flags of a command line, and of its --config file, that hold a secret; their names, never their values.

    Raises:
        UsageError: SGLang would stop at the command line.
    """
    given, rest = read_words(argv, known_flags(declared))
    unknown = [words[0].partition("=")[0] for words in _by_flag(rest) if _is_secret_unknown(words)]
    return (*(each.spelling for each in given if is_secret(each)), *unknown)


def plain_flags(argv: Sequence[str], declared: Declared | None = None) -> list[str]:
    """A command line for a server that only moefix asks: without secrets, and without TLS, which changes the protocol.

    The words stay as they are where nothing is to be left out. A --config file's flags take its place; where the
    tree's flags are not known it is left out, since it may hold both.

    Raises:
        UsageError: SGLang would stop at the command line.
    """
    given, rest = read_words(argv, known_flags(declared))
    kept = [each for each in given if not is_secret(each) and not _is_for_others(each.flag.dest)]
    others = [word for words in _by_flag(rest) if not _is_secret_unknown(words) for word in words]
    if len(kept) == len(given) and len(others) == len(rest):
        return list(server_words(argv))
    return [word for each in kept for word in each.words()] + others


def is_secret(given: Given) -> bool:
    """Whether a flag holds a secret, by its name or by a name in its JSON value."""
    if not given.flag.takes_value or given.flag.type in ("int", "float"):
        return False
    return any(map(_is_secret_name, given.flag.spellings)) or any(map(_holds_secret, given.texts))


def _is_for_others(dest: str) -> bool:
    """Whether a field is TLS, or the --config file, which is merged already."""
    return dest == "config" or "ssl" in dest.split("_")


def _is_secret_name(spelling: str) -> bool:
    return _NAME.search(spelling.lstrip("-").replace("-", "_")) is not None


def _holds_secret(text: str) -> bool:
    """Whether a value is JSON with a name in it that stands for a secret, at any depth."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        level = [json.loads(text)]
    except (ValueError, RecursionError):
        return False
    while level:
        names = [name for item in level if isinstance(item, dict) for name in item]
        words = [item.partition("=")[0] for item in level if isinstance(item, str) and item.startswith("--")]
        if any(map(_JSON_NAME.search, names)) or any(map(_is_secret_name, words)):
            return True
        level = [child for item in level for child in _children(item)]
    return False


def _children(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []


def _by_flag(words: Sequence[str]) -> list[list[str]]:
    """Words of flags that are not known, each flag with all words up to the next one."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _is_secret_unknown(words: Sequence[str]) -> bool:
    """Whether a flag that is not known sounds like a secret, or has a value with one."""
    name, _, value = words[0].partition("=")
    return (name.startswith("-") and _is_secret_name(name)) or any(map(_holds_secret, (value, *words[1:])))
