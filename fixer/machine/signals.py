"""Signals that wait: a process that is being started must be started whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT)
"""What `docker stop` and Ctrl-C send."""

ALARM = signal.SIGUSR1
"""What a watching thread wakes the main thread with (fixer/download.py); nobody else sends it."""


@contextmanager
def deferred() -> Iterator[None]:
    """Have SIGTERM, SIGINT and the alarm wait for the end of the `with` statement; keep it short.

    A handler that raises in the middle of multiprocessing's start leaves a child that nobody knows of, or one that
    complains with a traceback that its parent sent it nothing. Blocking the signals would be inherited by the child.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    came: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        came.add(number)

    held = [number for number in (*ENDING, ALARM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, note) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:  # what a user sent comes before the alarm
            if number in came:
                signal.raise_signal(number)


@contextmanager
def starting() -> Iterator[None]:
    """`deferred` around the start of a child of multiprocessing's that calls `settle_child` first of all.

    A terminal sends Ctrl-C's SIGINT to the child too, and Python would answer it with a traceback while it is still
    importing: it inherits that SIGINT is blocked.
    """
    from multiprocessing import resource_tracker

    with deferred():
        resource_tracker.ensure_running()  # here, since its start unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_child() -> None:
    """Have this child in a session of its own, deaf to Ctrl-C and mortal by SIGTERM."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def interruptible(at_most: float | None = 1.7) -> Iterator[None]:
    """Have SIGTERM unwind as Ctrl-C does, so that compiling processes and passing folders do not stay behind.

    What unwinds is not disturbed by a second signal. One that was ignored from the start (nohup) stays ignored.

    Args:
        at_most: seconds after which the process ends however far it has unwound: a file system may hang, and Python
            drops what a handler raises while an object is being finalised. What is kept is safe at any moment, and
            children end with their parent. None for work that takes its time to tidy up.
    """

    def leave(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if at_most is not None:
            last = threading.Timer(at_most, os._exit, (128 + number,))
            last.daemon = True
            last.start()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
