"""A server of SGLang's that moefix starts for a comparison, watches, and ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from fixer.base.errors import SGLangError
from fixer.base.files import make_folder, read_bounded
from fixer.machine.processes import end_group, free_port, start_child
from fixer.machine.signals import deferred
from fixer.sglang.lookup import CONFIG_DIR_VARIABLE
from fixer.sglang.server import HEALTH, local_flags, server_command

LOG_LINES = 12
"""How much of a dead server's log is shown."""


class Server:
    """A server of our own on 127.0.0.1, for use in a `with` statement: at its end the whole process group is gone.

    Args:
        flags: the user's SGLang flags.
        configs: its SGLANG_MOE_CONFIG_DIR.
        log: what it prints goes there.
        wait_seconds: how long it may take to become healthy.

    Raises:
        SGLangError: on entering, where it dies or does not become healthy.
    """

    def __init__(self, flags: Sequence[str], configs: Path, log: Path, wait_seconds: float) -> None:
        self.port = free_port()
        self.log = log
        self._command = server_command(local_flags(flags, self.port))
        self._environment = local_environment() | {CONFIG_DIR_VARIABLE: str(configs), "PYTHONUNBUFFERED": "1"}
        self._wait = wait_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        make_folder(self.log.parent)
        try:
            with self.log.open("wb") as stream, deferred():
                self._process = start_child(self._command, self._environment, stream)
            self._wait_healthy()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process group, whatever its members do with SIGTERM."""
        if self._process is not None:
            end_group(self._process)
        self._process = None

    def _wait_healthy(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._wait
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise SGLangError(f"The server ended with code {code} before it was healthy.", f"Its log: {self.log}")
            if self._is_healthy():
                return
            time.sleep(0.25)
        raise SGLangError(
            f"The server was not healthy after {self._wait:.0f} s.", f"Its log: {self.log}; --wait gives it longer."
        )

    def _is_healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.ask(HEALTH).status_code == httpx.codes.OK
        return False

    def ask(self, path: str) -> httpx.Response:
        """A short answer of the server.

        Raises:
            httpx.HTTPError: there is none.
        """
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5, trust_env=False)

    def log_text(self) -> str:
        """What it has printed so far, with progress bars' pieces as lines of their own."""
        with contextlib.suppress(OSError, ValueError):
            return read_bounded(self.log, 1 << 28).decode(errors="replace").replace("\r", "\n")
        return ""


def local_environment() -> dict[str, str]:
    """This process's environment, with no proxy between programs on this machine."""
    around = "127.0.0.1,localhost"
    here = {name: os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")}
    return {**os.environ, **{name: f"{value},{around}" if value else around for name, value in here.items()}}


def last_lines(text: str, most: int = LOG_LINES) -> list[str]:
    """The end of a log, without control characters and empty lines."""
    lines = ["".join(char for char in line if char.isprintable())[:300].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-most:]
