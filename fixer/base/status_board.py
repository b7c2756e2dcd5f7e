"""What a moefix at work says of itself to `moefix status`, to a health check and to whoever shares its data folder.

Each run has a file of its own, `run/<run id>.json` in the data folder, replaced in one step. The id is
`<host>-<process id>-<8 hexadecimal digits>`: containers on one volume may share a host name, and each has a process 1.
The server that moefix becomes keeps the process id, and with it the file: from then on the log's reader writes it.

Beside it lies `run/<run id>.lock`, which the process has locked (flock) as long as it lives, the server that moefix
becomes too: the kernel frees it, so all that share the data folder see an end that nobody could write down.

The health check needs none of that (`base.running_servers`): the data folder may be read-only, full, or another one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.base.errors import MoefixError, StoreError
from fixer.base.files import read_bounded, safe_name, utc_now, write_atomically
from fixer.base.locks import hold
from fixer.base.status import Phase, Share, Status, lock_path, state_path
from fixer.base.status_reading import current_states

if TYPE_CHECKING:
    from fixer.base.progress import Progress


WRITE_INTERVAL = 0.5
"""Seconds between two writings that only report progress."""


_PROGRESS = ("tuning", "download", "detail")


class Board:
    """A process's state, kept in its file. Writing it never fails: a server is worth more than a note about it.

    Args:
        status, path: the state so far, and its file.
        now: the monotonic clock, in seconds.
    """

    def __init__(self, status: Status, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.status, self.path = status, path
        self._now = now
        self._written = float("-inf")
        self._turn = threading.RLock()  # the download's thread tells of itself too
        self._lock = -1

    def __del__(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)

    def live(self) -> None:
        """Hold the lock that tells others that this process lives, until it ends or the board is thrown away."""
        self._lock = hold(lock_path(self.path))

    def update(self, **changes: Any) -> None:
        """Change some of the state's parts (see `Status`) and write it.

        Progress alone (`tuning`, `download`, `detail`) is written at most every half second.
        """
        with self._turn:
            before = self.status
            self.status = replace(before, **changes, updated=utc_now())
            hurry = any(getattr(before, name) != value for name, value in changes.items() if name not in _PROGRESS)
            if hurry or self._now() - self._written >= WRITE_INTERVAL:
                self._write()

    def _write(self) -> None:
        self._written = self._now()
        with contextlib.suppress(StoreError):
            write_atomically(self.path, self.status.to_json().encode())


def new_board(home: Path, now: Callable[[], float] = time.monotonic) -> Board:
    """This process's board in a data folder, written; old ones of ended processes are removed.

    Args:
        home: the data folder.
        now: the monotonic clock, in seconds.
    """
    began, host = utc_now(), socket.gethostname()
    run = f"{safe_name(host)}-{os.getpid()}-{os.urandom(4).hex()}"
    status = Status(host, os.getpid(), began, began, run=run)
    board = Board(status, state_path(home, run), now)
    board.live()
    current_states(home, begins=status)
    board.update()
    return board


@contextlib.contextmanager
def posted(board: Board) -> Iterator[Board]:
    """Have the board say how it ended, if it ends: as the server the process goes on."""
    try:
        yield board
    except MoefixError as fault:
        board.update(phase=Phase.FAILED, detail=_one_line(f"{fault.message} {fault.hint}"))
        raise
    except (SystemExit, KeyboardInterrupt):
        board.update(phase=Phase.ENDED, detail="")
        raise
    except BaseException as fault:
        board.update(phase=Phase.FAILED, detail=_one_line(f"{type(fault).__name__}: {fault}"))
        raise
    board.update(phase=Phase.ENDED, detail="")


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()[:1000]


WAITING_WORDS = "another moefix is tuning"
"""How `fixer.tuning.session` begins its note that it waits for another process."""


class OnBoard:
    """Passes progress on, and keeps a board up to date with it."""

    def __init__(self, progress: Progress, board: Board) -> None:
        self._progress = progress
        self._board = board
        self._share = Share(0, 0, "steps")
        self._before = board.status

    def phase(self, name: str, total: int) -> None:
        """A new phase begins."""
        self._share = Share(0, max(total, 0), "steps")
        self._board.update(phase=Phase.TUNING, detail=_one_line(name), tuning=self._share)
        self._progress.phase(name, total)

    def advance(self, detail: str = "", total: int | None = None) -> None:
        """One step is done."""
        done = self._share.done + 1
        self._share = Share(done, max(total or self._share.total, done), "steps")
        self._board.update(tuning=self._share)
        self._progress.advance(detail, total)

    def note(self, line: str) -> None:
        """One line that stays; waiting for another process is a phase of its own, until the next line."""
        if line.startswith(WAITING_WORDS):
            self._before = self._board.status
            self._board.update(phase=Phase.WAITING, detail=_one_line(line))
        elif self._board.status.phase is Phase.WAITING:
            self._board.update(phase=self._before.phase, detail=self._before.detail)
        self._progress.note(line)


def resume_board(path: Path) -> Board | None:
    """The board of a process whose state is in that file, for another one to go on with; None where there is none."""
    try:
        status = Status.from_json(read_bounded(path))
    except (OSError, ValueError):
        return None
    return Board(status, path)
