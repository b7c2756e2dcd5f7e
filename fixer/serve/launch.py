"""Splits moefix's own options from SGLang's flags, and becomes the SGLang server.

SGLang's flags are never parsed, reordered or respelt here. `--model` and `--model-path` are one option to SGLang in
0.4.9 and in 0.5.17 alike (server_args.py), so either is passed on as given.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fixer.base.errors import SGLangError, UsageError
from fixer.serve.log.relay import Settings, start_relay

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


# --- the server ------------------------------------------------------------------------------------------------------


def server_command(argv: Sequence[str]) -> list[str]:
    """The server's command line: this Python, SGLang's launcher, and exactly the user's flags.

    `python -m sglang.launch_server` is in every release from 0.4.9 to 0.5.23; `sglang serve` is not.
    """
    return [sys.executable, "-m", "sglang.launch_server", *argv]


def reachable(argv: Sequence[str], host: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """SGLang's flags, behind `--host 0.0.0.0` where moefix's image runs and no host is given.

    SGLang listens on the loopback by default, which a port that Docker publishes does not reach.
    """
    if host is not None or environ.get("MOEFIX_IMAGE") != "1":
        return tuple(argv)
    return ("--host", "0.0.0.0", *argv)  # noqa: S104 (inside a container; what is published is Docker's business)


def become_server(argv: Sequence[str], env: Iterable[tuple[str, str]] = (), relay: Settings | None = None) -> NoReturn:
    """Replace this process by the SGLang server: same process id, so signals and exit code are the server's own.

    Args:
        argv: SGLang's flags.
        env: environment variables to add; all else stays as it is.
        relay: what the process that reads along in the server's output is told; None for none.

    Raises:
        SGLangError: there is no SGLang for this Python, or the server cannot be started.
    """
    command = server_command(argv)
    environment = {**os.environ, **dict(env)}
    _require_sglang(environment)
    for stream in (sys.stdout, sys.stderr):
        # What Python still holds would be lost with this program. A reader that is gone is no reason not to serve.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if relay is not None:
        # Python holds back what it prints into a pipe, though not what it prints on a terminal.
        environment.update({"PYTHONUNBUFFERED": "1"} if _on_terminal(1) else {})
        start_relay(relay)
    try:
        os.execve(command[0], command, environment)  # noqa: S606 (a list of arguments, and no shell is the point)
    except (OSError, ValueError) as fault:
        raise SGLangError(
            f"the server cannot be started with {command[0]}: {fault}",
            "Check that this Python is still in its place, and that no flag holds a zero byte.",
        ) from fault


def _on_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _require_sglang(environment: Mapping[str, str]) -> None:
    """Look for SGLang's launcher, without importing it: that takes seconds, and the server does it anyway."""
    if not sys.executable:
        raise SGLangError("Python does not know where it is itself", "Start moefix by the full path of its Python.")
    added = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    found = importlib.util.find_spec("sglang") or importlib.machinery.PathFinder.find_spec("sglang", added)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise SGLangError(
            f"SGLang is not installed for {sys.executable}",
            "Install it there (pip install sglang), or run moefix's image.",
        )
    if not any(Path(folder, "launch_server.py").is_file() for folder in folders):
        raise SGLangError(
            f"there is no sglang.launch_server in {folders[0]}",
            "Install SGLang anew; a folder called sglang without the package in it may be in the way.",
        )
