"""A server that moefix starts for itself: in a process group that is gone afterwards, however moefix ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fixer.base.errors import SGLangError

STOP_SECONDS = 8.0
"""How long a server that was asked to end is waited for: it has nothing to save."""

HURRY_SECONDS = 0.5
"""How long a killed server is waited for where moefix itself is ending."""

# PR_SET_PDEATHSIG (1) outlives the exec. Not a `preexec_fn`: that deadlocks where other threads hold a lock.
_BOOT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def start_child(
    command: Sequence[str], environment: Mapping[str, str], stream: Any, passed: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, whose first process the kernel kills when this one ends.

    SGLang's other processes end with it (`kill_itself_when_parent_died`). Call it with signals `deferred` up to where
    its result is kept, and from a thread that lives as long as the command may: the kernel goes by the thread.

    Args:
        command: the program's path, and its arguments.
        environment: its whole environment.
        stream: what it prints goes there.
        passed: file descriptors that it inherits.

    Raises:
        SGLangError: it cannot be started.
    """
    if shutil.which(command[0]) is None:
        raise SGLangError(f"{command[0]} cannot be started: there is no such program")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid()), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(passed),
        )
    except (OSError, ValueError) as fault:
        raise SGLangError(f"{command[0]} cannot be started: {fault}") from fault


def end_group(
    process: subprocess.Popen[bytes], asked_seconds: float = STOP_SECONDS, killed_seconds: float = STOP_SECONDS
) -> None:
    """End a session's first process and all of its group.

    Args:
        process: the first process.
        asked_seconds: how long they have after SIGTERM; 0 sends none.
        killed_seconds: how long they are waited for after SIGKILL: their memory on the card is freed as they end.
    """
    for number, seconds in ((signal.SIGTERM, asked_seconds), (signal.SIGKILL, killed_seconds)):
        if seconds > 0 and _ends(process, number, seconds):
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.1)  # a zombie until it is waited for
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-process.pid, os.WNOHANG)[0]:  # as process 1, moefix inherits its grandchildren
            pass


def _ends(process: subprocess.Popen[bytes], number: int, seconds: float) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process.poll()
        if not _group_lives(process.pid):
            return True
        time.sleep(0.02)
    return False


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs. Zombies, which nobody but their parent can remove, do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process with its parent: a card that hangs would keep it from seeing the pipe close."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def usable_cores() -> int:
    """Cores that this process may use: a container may have fewer than the machine, by affinity or by quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores
