"""Splits moefix's own options from SGLang's flags, and becomes the SGLang server.

SGLang's flags are passed on as they are given, but for what `fixer.sglang.words` writes out (the model by position).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from fixer.base.errors import SGLangError
from fixer.serve.log.settings import Settings
from fixer.serve.log.start_relay import start_relay
from fixer.sglang.server import require_sglang, server_command

# --- how an option's value is read: `name` is the flag or the variable that it came from -----------------------------


# --- the server ------------------------------------------------------------------------------------------------------


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
    require_sglang(environment)
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
