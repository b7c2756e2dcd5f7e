"""SGLang's command line as SGLang reads it: an argparse parser built from the flags that a tree declares.

Abbreviations, `--flag=value`, repeated flags and lists of values agree with SGLang by construction. The words are kept
as they are written; what they mean is `fixer.sglang.flags`' business.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fixer.base.errors import UsageError
from fixer.sglang.config_file import CONFIG, can_merge, merged
from fixer.sglang.declared import Declared
from fixer.sglang.flag import Flag
from fixer.sglang.words import server_words


class UnknownFlagError(UsageError):
    """A word that SGLang's server does not take.

    Attributes:
        word: it.
        near: the flag that is most like it, "" for none.
    """

    def __init__(self, word: str, near: str) -> None:
        if word.startswith("-"):
            word = word.partition("=")[0]  # what follows may be a secret
            meant = f"Did you mean {near}?" if near else "Your SGLang lists its flags: sglang serve --help."
            super().__init__(f"SGLang has no flag {shortened(word)}", meant)
        else:
            super().__init__(f"{shortened(word)} belongs to no flag", "A model comes first, or behind --model.")
        self.word, self.near = word, near

    def or_of(self, options: Iterable[str]) -> UsageError:
        """The same error, or one that names the command's own option where the word is more like one."""
        own = nearest(self.word, options)
        if not own or _likeness(self.word, own) <= _likeness(self.word, self.near):
            return self
        return UsageError(f"there is no option {shortened(self.word)}", f"Did you mean {own}?")


@dataclass(frozen=True)
class Given:
    """A flag on a command line: what it is, its full name there, and the words of its value."""

    flag: Flag
    spelling: str
    texts: tuple[str, ...]

    def words(self) -> list[str]:
        """The flag as words of a command line."""
        joined = len(self.texts) == 1 and self.texts[0].startswith("-")
        return [f"{self.spelling}={self.texts[0]}"] if joined else [self.spelling, *self.texts]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^(ambiguous option: [^=]*)=.*( could match )", r"\1\2", message, flags=re.DOTALL)
        text = re.sub(r"^argument (\S+?)(?:/\S+)?: expected .* argument", r"\1 needs a value", text)
        text = text.removeprefix("argument ")
        raise UsageError(" ".join(text.split())[:250])


class _Keeps(argparse.Action):
    """Appends what was given to the namespace's `given`; nothing is converted."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        texts = values if isinstance(values, list) else [] if values is None else [values]
        namespace.given.append((option_string, tuple(texts)))


class _Store(_Keeps, argparse._StoreAction):
    pass


class _Switch(_Keeps, argparse._StoreTrueAction):
    pass


class _OnOff(_Keeps, argparse.BooleanOptionalAction):
    pass


_ACTIONS = {"store": _Store, "store_true": _Switch, "BooleanOptionalAction": _OnOff}


def _parser(declared: Declared) -> _Parser:
    """SGLang's parser, with actions that keep the words (SGLang's own merger of --config asks for their classes)."""
    parser = _Parser(prog="sglang serve", add_help=False, argument_default=argparse.SUPPRESS)
    for flag in declared.flags:
        action: Any = _ACTIONS.get(flag.action, _Keeps)
        words: dict[str, Any] = {}
        if action in (_Store, _Keeps):
            words = {"nargs": flag.nargs if flag.takes_value else 0}
        parser.add_argument(*flag.spellings, dest=flag.dest, action=action, **words)
    return parser


def read_words(argv: Sequence[str], declared: Declared) -> tuple[list[Given], list[str]]:
    """What a command line gives, in order, its --config file's flags first; and the words that no flag takes.

    Raises:
        UsageError: SGLang would stop at it: a value is missing, an abbreviation is ambiguous, --config is no YAML.
    """
    parser, words = _parser(declared), list(server_words(argv))
    if CONFIG in words and declared.package and can_merge(Path(declared.package)):
        words = merged(Path(declared.package), parser, words)
    namespace = argparse.Namespace(given=[])
    _, rest = parser.parse_known_args(words, namespace)
    flags = {spelling: flag for flag in declared.flags for spelling in flag.spellings}
    return [Given(flags[_positive(spelling, flags)], spelling, texts) for spelling, texts in namespace.given], rest


def _positive(spelling: str, flags: Mapping[str, Flag]) -> str:
    """The flag that `--no-flag` switches off, or the flag itself."""
    return spelling if spelling in flags else "--" + spelling.removeprefix("--no-")


def nearest(word: str, spellings: Iterable[str]) -> str:
    """The spelling that is most like a word, or that it abbreviates with a mistake; "" where none is near."""
    bare = word.partition("=")[0]
    best = max(spellings, key=lambda spelling: _likeness(bare, spelling), default="")
    return best if _likeness(bare, best) >= 0.7 else ""


def _likeness(word: str, spelling: str) -> float:
    """From 0 to 1: how much of two words is the same, or of a word and the beginning of a longer one."""
    import difflib

    whole = difflib.SequenceMatcher(None, word, spelling).ratio()
    return max(whole, 0.95 * difflib.SequenceMatcher(None, word, spelling[: len(word)]).ratio())


def has_plugins() -> bool:
    """Whether packages are installed that may add flags and choices to SGLang (srt/plugins/__init__.py of 0.5.17)."""
    import importlib.metadata

    return bool(importlib.metadata.entry_points(group="sglang.srt.plugins"))


_CONVERTERS: Mapping[str, Callable[[str], Any]] = {"int": int, "float": float}


def check_words(given: Given) -> None:
    """Hold a flag's words against its type and its choices, as argparse does.

    Raises:
        UsageError: SGLang would refuse one.
    """
    choices = None if given.flag.choices is None else [str(choice) for choice in given.flag.choices]
    for text in given.texts:
        try:
            _CONVERTERS.get(given.flag.type, str)(text)
        except ValueError:
            raise UsageError(
                f"{given.spelling} is {shortened(text)}, but must be a number ({given.flag.type})"
            ) from None
        if choices is not None and text.strip() not in choices and not has_plugins():
            import difflib

            near = difflib.get_close_matches(text.lower(), choices, n=1, cutoff=0.5)
            listed = f"SGLang takes {', '.join(choices)}."
            raise UsageError(
                f"{given.spelling} is {shortened(text)}, which this SGLang does not take",
                f"Did you mean {near[0]}? {listed}" if near else listed,
            )


def shortened(text: str) -> str:
    """A user's text, quoted, on one line, of bounded length."""
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
