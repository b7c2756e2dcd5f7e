"""A child process that answers requests, one at a time, and is started anew when it dies or hangs.

What measures on a card lives in one: a kernel that corrupts the CUDA context, hangs or exhausts memory costs one
candidate and a few seconds, not the run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from fixer.base.errors import MoefixError, TuneError
from fixer.base.text import told
from fixer.machine.processes import die_with_parent
from fixer.machine.signals import settle_child, starting

Handler = Callable[[Any], Any]
Factory = Callable[[], Handler]
"""Runs in the child and gives the function that answers; must be importable there (a `functools.partial` is)."""


class Fate(Enum):
    """Why there is no answer."""

    CRASHED = "crashed"
    TIMED_OUT = "timed out"


class ChildProcess:
    """A respawning child.

    Args:
        factory: builds the handler in the child.
        start_seconds: how long building may take.
    """

    def __init__(self, factory: Factory, start_seconds: float = 180.0) -> None:
        self._factory = factory
        self._start_seconds = start_seconds
        self._context = multiprocessing.get_context("spawn")  # a child of CUDA must not inherit anything
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._is_ready = False
        self._owed = 0
        self._since = 0.0
        self.restarts = -1

    def start(self) -> None:
        """Start the child without waiting until it is ready."""
        if self._process is not None and (self._process.is_alive() or not self._is_ready or self._owed):
            return  # a death before it was ready is for `is_ready` to report, one that owes answers for `receive`
        self.close()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._factory), daemon=True, name="moefix-measure")
        with starting():
            process.start()
            self._process = process
        theirs.close()
        self._pipe, self._is_ready, self._since = ours, False, time.monotonic()
        self.restarts += 1

    def wait_ready(self) -> None:
        """Wait until the handler is built.

        Raises:
            MoefixError: what the factory raised; TuneError where it died or took too long.
        """
        left = self._since + self._start_seconds - time.monotonic()
        if not self.is_ready(max(0.0, left) if self._process is not None else self._start_seconds):
            self.close()
            raise TuneError("The measuring process did not become ready in time.", "See the lines above.")

    def is_ready(self, timeout: float = 0.0) -> bool:
        """Whether the handler is built, after waiting at most `timeout` seconds; starts the child where there is none.

        Raises:
            MoefixError: what the factory raised; TuneError where it died or took too long.
        """
        self.start()
        if self._is_ready or self._pipe is None:
            return self._is_ready
        try:
            if not self._pipe.poll(timeout):
                if time.monotonic() < self._since + self._start_seconds:
                    return False
                answer: Any = Fate.TIMED_OUT
            else:
                answer = self._pipe.recv()
        except (EOFError, OSError):
            answer = Fate.CRASHED
        if isinstance(answer, MoefixError):
            self.close()
            raise answer
        if isinstance(answer, Fate):
            self.close()
            raise TuneError(f"The measuring process could not start: it {answer.value}.", "See the lines above.")
        self._is_ready = True
        return True

    @property
    def connection(self) -> Connection:
        """The pipe on which an answer arrives (for `multiprocessing.connection.wait`)."""
        if self._pipe is None:
            raise TuneError("The measuring process is not running.")
        return self._pipe

    def send(self, request: Any) -> None:
        """Send a request; its answer is read with `receive`."""
        self.wait_ready()
        self._owed += 1
        with suppress(OSError):  # it died: `receive` says so
            self.connection.send(request)

    def receive(self, timeout: float) -> Any:
        """The answer, or a Fate where there is none; after a Fate the child is gone and starts anew at the next send.

        Raises:
            MoefixError: the handler raised it.
        """
        try:
            answer = self.connection.recv() if self.connection.poll(timeout) else Fate.TIMED_OUT
        except (EOFError, OSError):
            answer = Fate.CRASHED
        if isinstance(answer, Fate):
            self.close()
            return answer
        self._owed -= 1
        if isinstance(answer, MoefixError):
            raise answer
        return answer

    def ask(self, request: Any, timeout: float) -> Any:
        """Send a request and wait for its answer or its Fate."""
        self.send(request)
        return self.receive(timeout)

    def close(self) -> None:
        """End the child now."""
        if self._process is not None and self._process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join(10)
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
        self._is_ready, self._owed = False, 0


def _serve(pipe: Connection, factory: Factory) -> None:
    """The child's life: build, say so, answer until the pipe closes. An error that is not moefix's ends it."""
    settle_child()
    die_with_parent()
    with suppress(EOFError, OSError):  # the parent is gone: so is the reason to live
        try:
            handle = factory()
        except MoefixError as error:
            pipe.send(error)
            return
        except Exception as error:  # whatever PyTorch or the driver throws: one line, no traceback
            pipe.send(TuneError(f"The measuring process could not start: {told(error)}."))
            return
        pipe.send("ready")
        while True:
            request = pipe.recv()
            try:
                answer = handle(request)
            except MoefixError as error:
                answer = error
            except Exception as error:  # the card's context may be spoiled: this process is worth nothing any more
                print(f"moefix: measuring failed: {told(error)}", file=sys.stderr, flush=True)
                os._exit(1)
            pipe.send(answer)
