"""A command line as people have it, as plain flags of SGLang's server.

`sglang serve MODEL --tp 2`, `python -m sglang.launch_server --model-path MODEL` and `MODEL --tp 2` mean the same. As in
SGLang (cli/serve.py of 0.5.17) only the first word can be a model without a flag: of a later one nobody could say
whether it is the value of the flag before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from fixer.base.errors import UsageError

MODEL_FLAGS = ("--model-path", "--model")

_PYTHON = re.compile(r"(.*/)?python[0-9.]*")
_SGLANG = re.compile(r"(.*/)?sglang")


def starts_sglang(word: str) -> bool:
    """Whether a command line that begins with this word may be one that starts SGLang."""
    return bool(_PYTHON.fullmatch(word) or _SGLANG.fullmatch(word))


def server_words(argv: Sequence[str]) -> tuple[str, ...]:
    """The server's flags in a command line: without the program, the model behind --model-path, `~` in it expanded.

    Raises:
        UsageError: it starts another program than SGLang's server, or a server that makes no text.
    """
    words = _without_program(list(argv))
    if words and words[0] and not words[0].startswith("-"):
        words[:1] = ["--model-path", words[0]]
    return tuple(_expanded(_without_model_type(words)))


def _without_program(words: list[str]) -> list[str]:
    if words and _PYTHON.fullmatch(words[0]):
        if "-m" in words and words[words.index("-m") + 1 :][:1] == ["sglang.launch_server"]:
            return words[words.index("-m") + 2 :]
        raise UsageError(f"moefix does not start {' '.join(words[:3])[:60]!r}", "Write: moefix serve MODEL [FLAGS].")
    if words and _SGLANG.fullmatch(words[0]) and not os.path.isdir(words[0]):
        if words[1:2] == ["serve"]:
            return words[2:]
        raise UsageError(f"moefix does not start {' '.join(words[:2])[:60]!r}", "Write: moefix serve MODEL [FLAGS].")
    return words


def _without_model_type(words: list[str]) -> list[str]:
    """`sglang serve` takes --model-type for itself, so the server that moefix starts does not know it."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--model-type":
            kept.append(word)
            continue
        value = value if equals else next(rest, "")
        if value not in ("auto", "llm"):
            raise UsageError(f"--model-type {value[:40]!r} is no language model", "Start it with sglang serve itself.")
    return kept


def _expanded(words: list[str]) -> list[str]:
    """The words with `~` expanded where it begins the model: no shell does that behind "=", and neither does SGLang."""
    return [_expanded_word(before, word) for before, word in zip(["", *words], words, strict=False)]


def _expanded_word(before: str, word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and name in MODEL_FLAGS and value.startswith("~"):
        return f"{name}={os.path.expanduser(value)}"
    return os.path.expanduser(word) if before in MODEL_FLAGS and word.startswith("~") else word
