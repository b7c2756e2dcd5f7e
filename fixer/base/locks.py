"""File locks that the kernel frees when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from fixer.base.errors import StoreError
from fixer.base.files import FILE_MODE, make_folder, store_error, take_owner_of

_held: set[int] = set()


def _close_in_child() -> None:
    """A child forked while a lock is held must not hold it too: the lock would outlive a parent that is killed."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """A lock between processes and containers that share a volume, for use in a `with` statement.

    It is the kernel's (flock on a file), so the death of its holder frees it at once, however it died. The file stays.

    Args:
        path: the lock file, made if need be.
        waiting: called about every `poll_seconds` while another process holds the lock, with the seconds waited so
            far and a text that says who holds it.
        poll_seconds: how often to try, in seconds.
        patience_seconds: give up after that long, in seconds; None waits on.
        waited: called once the lock is had, if another process held it before.

    Raises:
        StoreError: on entering, where the file cannot be made or locked, or patience ran out.
    """

    def __init__(
        self,
        path: Path,
        waiting: Callable[[float, str], None] | None = None,
        poll_seconds: float = 0.2,
        patience_seconds: float | None = None,
        waited: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._waiting, self._waited = waiting, waited
        self._poll = poll_seconds
        self._patience = patience_seconds
        self._handle = -1

    def __enter__(self) -> Lock:
        make_folder(self._path.parent)
        try:
            self._handle = self._open()
            _held.add(self._handle)
            self._acquire()
        except BaseException as fault:
            self._close()
            if isinstance(fault, OSError):
                raise store_error(f"the lock {self._path} cannot be taken", fault) from fault
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_CLOEXEC
        try:
            handle = os.open(self._path, os.O_RDWR | flags, FILE_MODE)
        except PermissionError:
            # Another user's lock file: flock asks for no right to write.
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        take_owner_of(self._path.parent, handle)
        return handle

    def _acquire(self) -> None:
        began, is_first = time.monotonic(), True
        while not self._try():
            is_first = False
            waited = time.monotonic() - began
            if self._patience is not None and waited >= self._patience:
                raise StoreError(
                    f"{self._holder()} has held {self._path} for more than {waited:.0f} s",
                    "Wait for it to finish, or stop it.",
                )
            if self._waiting:
                self._waiting(waited, self._holder())
            time.sleep(self._poll)
        self._sign()
        if self._waited and not is_first:
            self._waited()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sign(self) -> None:
        # Who holds it is a courtesy to those who wait; on a full disk or a foreign file it is left out.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _holder(self) -> str:
        text = ""
        with contextlib.suppress(OSError):
            text = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
        return text if text.isprintable() and text else "another process"

    def _close(self) -> None:
        if self._handle in _held:
            _held.discard(self._handle)
            os.close(self._handle)
        self._handle = -1


def hold(path: Path) -> int:
    """Take a run's lock for the rest of its life; -1 where that cannot be had, and then no lock file lies there."""
    handle = -1
    try:
        make_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        take_owner_of(path.parent, handle)
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # somebody looks whether it is free, for an instant
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        os.set_inheritable(handle, True)  # over the exec into the server; children of Python's get it not
    except (OSError, StoreError):
        if handle >= 0:
            os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()  # a file system without locks, or another user's: nobody is to take this one for free
        return -1
    return handle


def is_held(path: Path) -> bool | None:
    """Whether a process's lock is held, so that it lives; None where that cannot be told."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


LOCK_SECONDS = 0.5
"""How long a start tries to have its own lock, which only those who look at it can hold for an instant."""
