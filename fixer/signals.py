"""Signals that wait: a process that is being started must be started whole, or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)
"""What `docker stop` and Ctrl-C send."""


@contextmanager
def deferred() -> Iterator[None]:
    """Have SIGTERM and SIGINT wait for the end of the `with` statement; keep it short.

    A handler that raises in the middle of multiprocessing's start leaves a child that nobody knows of, or one that
    complains with a traceback that its parent sent it nothing. Blocking the signals would be inherited by the child.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in ENDING if signal.getsignal(number) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
