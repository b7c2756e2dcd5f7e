"""Finds the servers that moefix has become among the running processes, without the data folder.

`serve` leaves `MOEFIX_RUN` in the server's environment: the run's id, a blank, the server's address. A run's id is
`<host>-<process id>-<8 hexadecimal digits>`. The server's children inherit the variable; the process id in it says
which process is the server itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

VARIABLE = "MOEFIX_RUN"

PROC = Path("/proc")


def run_variable(run: str, url: str) -> tuple[str, str]:
    """The environment variable, and its value for a run's server."""
    return VARIABLE, f"{run} {url}"


def started_with(pid: int | str) -> str:
    """The value of the variable with which a process was started, "" for none.

    Raises:
        OSError: it is another user's process, or gone.
    """
    for variable in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
        name, _, value = variable.decode("utf-8", "replace").partition("=")
        if name == VARIABLE:
            return value
    return ""


def running_servers() -> dict[str, str]:
    """The servers that this process namespace shows: run ids and addresses."""
    found = {}
    for process in PROC.iterdir() if PROC.is_dir() else ():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                run, _, url = started_with(process.name).partition(" ")
                if run.split("-")[-2:-1] == [process.name]:
                    found[run] = url
    return found


def may_serve(pid: int, run: str) -> bool:
    """Whether a process can be a run's server: a container of the same host name has a process of that id too."""
    try:
        return started_with(pid).startswith(f"{run} ")
    except OSError:
        return True
