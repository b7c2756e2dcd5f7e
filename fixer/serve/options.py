"""moefix's own options of a start, apart from SGLang's flags."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixer.base.errors import UsageError

_PREFIX = "--moefix"


_SWITCHES = ("skip-tune", "fresh", "strict", "quiet", "dry-run", "skip-download", "ask")


_VALUES = ("smem-limit", "home", "sglang-root")


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


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

    skip_tune: bool = False
    fresh: bool = False
    strict: bool = False
    smem_limit: int | None = None
    home: Path | None = None
    sglang_root: Path | None = None
    quiet: bool = False
    dry_run: bool = False
    skip_download: bool = False
    ask: bool = False


def split_flags(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[MoefixOptions, tuple[str, ...]]:
    """Take moefix's options out of a command line.

    Args:
        argv: all arguments, moefix's and SGLang's in any order; those after a bare `--` are all SGLang's.
        environ: environment variables, for options that no flag sets.

    Returns:
        The options, and every other argument, unchanged and in order.

    Raises:
        UsageError: an option that starts with --moefix is unknown, lacks its value or has one too many; or a value
            makes no sense.
    """
    given = {name: environ[_variable(name)] for name in _SWITCHES + _VALUES if _variable(name) in environ}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif argument.startswith(_PREFIX):
            name, value = _own_option(argument, arguments)
            given[name] = value
        else:
            rest.append(argument)
    return _options(given), tuple(rest)


def _variable(name: str) -> str:
    return "MOEFIX_" + name.replace("-", "_").upper()


def _own_option(argument: str, following: Iterable[str]) -> tuple[str, str]:
    """The option's name and value. A switch's value is "1"; any other option takes the next argument if it has none."""
    spelt, equals, value = argument.partition("=")
    name = spelt.removeprefix(_PREFIX + "-")
    if name in _SWITCHES and spelt.startswith(_PREFIX + "-"):
        if equals:
            raise UsageError(f"{spelt} takes no value, and got {value!r}", f"Write {spelt} alone, or leave it out.")
        return name, "1"
    if name not in _VALUES or not spelt.startswith(_PREFIX + "-"):
        raise _unknown(spelt)
    if not equals:
        value = next(iter(following), "")
    if not value:
        raise UsageError(f"{spelt} needs a value", f"Write {spelt}=VALUE.")
    return name, value


def _unknown(spelt: str) -> UsageError:
    name = spelt.removeprefix(_PREFIX).replace("_", "-").strip("-")
    near = difflib.get_close_matches(name, _SWITCHES + _VALUES, n=3, cutoff=0.6)
    shown = [f"{_PREFIX}-{name}" for name in near or _SWITCHES + _VALUES]
    return UsageError(
        f"moefix has no option {spelt[:60]!r}",
        f"Did you mean {' or '.join(shown)}?" if near else f"moefix's own options are {', '.join(shown)}.",
    )


def _options(given: Mapping[str, str]) -> MoefixOptions:
    return MoefixOptions(
        skip_tune=_switch(given, "skip-tune"),
        fresh=_switch(given, "fresh"),
        strict=_switch(given, "strict"),
        smem_limit=_bytes(given, "smem-limit"),
        home=_folder(given, "home"),
        sglang_root=_folder(given, "sglang-root"),
        quiet=_switch(given, "quiet"),
        dry_run=_switch(given, "dry-run"),
        skip_download=_switch(given, "skip-download"),
        ask=_switch(given, "ask"),
    )


def _switch(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise UsageError(f"{_variable(name)} is {given[name][:40]!r}", "Set it to 1 or 0, or leave it out.")
    return value in _TRUE


def _bytes(given: Mapping[str, str], name: str) -> int | None:
    value = given.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0):
        raise UsageError(f"{_PREFIX}-{name} is {value[:40]!r}, not a number of bytes", "Write it as 101376, say.")
    return int(value)


def _folder(given: Mapping[str, str], name: str) -> Path | None:
    value = given.get(name, "")
    if "\0" in value:
        raise UsageError(f"{_PREFIX}-{name} holds a zero byte", "Name a folder.")
    return Path(value) if value else None
