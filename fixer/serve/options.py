"""moefix's own options of a start, apart from SGLang's flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fixer.base.errors import UsageError
from fixer.sglang.words import server_words

_PREFIX = "--moefix"


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _truth(name: str, value: str) -> bool:
    word = value.strip().lower()
    if word not in _TRUE + _FALSE:
        raise UsageError(f"{name} is {value[:40]!r}", "Set it to 1 or 0, or leave it out.")
    return word in _TRUE


def _bytes(name: str, value: str) -> int:
    text = value.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise UsageError(f"{name} is {text[:40]!r}, not a number of bytes", f"Write {name}=101376, say.")
    return int(text)


def _folder(name: str, value: str) -> Path:
    if not value or "\0" in value:
        raise UsageError(f"{name} is {value[:40]!r}", f"Name a folder: {name}=FOLDER.")
    return Path(value)


_SWITCH, _BYTES, _FOLDER = {"read": _truth}, {"read": _bytes}, {"read": _folder}


@dataclass(frozen=True)
class MoefixOptions:
    """moefix's own options, each `--moefix-<name>` or the environment variable `MOEFIX_<NAME>`; the flag counts first.

    Attributes:
        skip_tune: do not measure; install what is kept, or what fits.
        fresh: tune anew, whatever is kept.
        strict: a failed tuning, or asking that fails, is an error, not a warning.
        smem_limit: a lower limit of shared memory per block, in bytes; None for the card's own.
        home: the data folder; None for the default.
        sglang_root: SGLang's tree; None for the installed one.
        quiet: print warnings and errors only.
        dry_run: fetch no weights, do not ask SGLang, and do not start the server.
        skip_download: leave the weights' download to SGLang.
        ask: ask SGLang itself which file it will look for, where that is not known from an earlier start.
    """

    skip_tune: bool = field(default=False, metadata=_SWITCH)
    fresh: bool = field(default=False, metadata=_SWITCH)
    strict: bool = field(default=False, metadata=_SWITCH)
    smem_limit: int | None = field(default=None, metadata=_BYTES)
    home: Path | None = field(default=None, metadata=_FOLDER)
    sglang_root: Path | None = field(default=None, metadata=_FOLDER)
    quiet: bool = field(default=False, metadata=_SWITCH)
    dry_run: bool = field(default=False, metadata=_SWITCH)
    skip_download: bool = field(default=False, metadata=_SWITCH)
    ask: bool = field(default=False, metadata=_SWITCH)


OWN_FLAGS: Mapping[str, Field[Any]] = {
    f"{_PREFIX}-{option.name.replace('_', '-')}": option for option in fields(MoefixOptions)
}
"""Each option by its flag."""


def split_flags(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[MoefixOptions, tuple[str, ...]]:
    """Take moefix's options out of a command line.

    Args:
        argv: all arguments, moefix's and SGLang's in any order; those after a bare `--` are all SGLang's.
        environ: environment variables, for options that no flag sets.

    Returns:
        The options, and every other argument in order, by `fixer.sglang.words.server_words`.

    Raises:
        UsageError: an option that starts with --moefix is unknown, lacks its value or has one too many; or a value
            makes no sense.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    given, rest = _parser().parse_known_args(list(argv[:end]))
    for word in rest:
        if word.startswith(_PREFIX):
            raise _unknown(word.partition("=")[0])
    values = {**_from_variables(environ), **vars(given)}
    return MoefixOptions(**values), server_words((*rest, *argv[end:]))


def _from_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    named = {f"MOEFIX_{option.name.upper()}": option for option in OWN_FLAGS.values()}
    return {
        option.name: option.metadata["read"](variable, environ[variable])
        for variable, option in named.items()
        if environ.get(variable)
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        what = message.removeprefix("argument ")
        raise UsageError(" ".join(what.split())[:200], f"Write {what.partition(':')[0]} as moefix serve --help has it.")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag, option in OWN_FLAGS.items():
        read = option.metadata["read"]
        how: dict[str, Any] = {"action": "store_true"} if read is _truth else {"type": partial(read, flag)}
        parser.add_argument(flag, dest=option.name, **how)
    return parser


def _unknown(spelt: str) -> UsageError:
    import difflib

    flags = {flag.removeprefix(_PREFIX): flag for flag in OWN_FLAGS}
    near = difflib.get_close_matches(spelt.removeprefix(_PREFIX).replace("_", "-"), flags, n=3, cutoff=0.6)
    shown = [flags[name] for name in near or flags]
    return UsageError(
        f"moefix has no option {spelt[:60]!r}",
        f"Did you mean {' or '.join(shown)}?" if near else f"moefix's own options are {', '.join(shown)}.",
    )
