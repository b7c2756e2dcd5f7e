"""Start the process through which the server's output passes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
from pathlib import Path

import fixer
from fixer.serve.log.settings import Settings

PIPE_BYTES = 1 << 20
"""Size of the server's pipes, the most that Linux lets anybody have by default."""


START_SECONDS = 10.0
"""How long moefix waits for the relay's sign of life before it starts the server without one."""


_BOOT = "import sys; sys.path.append(sys.argv[1]); from fixer.serve.log.relay import main; main(sys.argv[2:])"


def start_relay(settings: Settings) -> bool:
    """Have this process's standard output and error go through a relay from now on.

    Returns:
        False where that cannot be had; then nothing has changed.
    """
    try:
        streams = [1] if _same_file(1, 2) else [1, 2]
        pipes = [_pipe() for _ in streams]
    except OSError:
        return False  # closed, or no file descriptors left: the server is better off as it is
    try:
        if not _launch(settings, [(read, out) for (read, _), out in zip(pipes, streams, strict=True)]):
            return False
        for descriptor in (1, 2):
            os.dup2(pipes[min(descriptor, len(pipes)) - 1][1], descriptor)
        return True
    finally:
        for pipe in pipes:
            for end in pipe:
                os.close(end)


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):  # a user with many pipes gets smaller ones
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def _same_file(one: int, other: int) -> bool:
    """Whether both descriptors lead to one place, so that one pipe must keep the order of what goes there."""
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino, first.st_rdev) == (second.st_dev, second.st_ino, second.st_rdev)


def _launch(settings: Settings, streams: list[tuple[int, int]]) -> bool:
    """Start the relay and wait for its sign of life."""
    ready, sign = os.pipe()
    words = [f"{source}:{target}" for source, target in streams]
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        _BOOT,
        str(Path(fixer.__file__).resolve().parents[1]),
        str(sign),
        *words,
    ]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[sign, *(source for source, _ in streams)],
            start_new_session=True,
        )
    except OSError:
        os.close(ready)
        return False
    finally:
        os.close(sign)
    try:
        process.communicate(settings.to_json().encode(), timeout=START_SECONDS)
        found, _, _ = select.select([ready], [], [], START_SECONDS)
        alive = bool(found) and os.read(ready, 1) == b"r"
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        alive = False
    finally:
        os.close(ready)
    return alive  # if not, and one starts late, it finds its pipes closed and ends
