"""What a moefix at work says of itself to `moefix status`, to a health check and to whoever shares its data folder.

Each process has a file of its own, `run/<host>-<process id>.json` in the data folder, replaced in one step. The server
that moefix becomes keeps the process id, and with it the file: from then on the log's relay writes it.

Beside it lies `run/<host>-<process id>.lock`, which the process has locked (flock) as long as it lives, the server that
moefix becomes too: the kernel frees it, so all that share the data folder see an end that nobody could write down.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.base.errors import MoefixError, StoreError
from fixer.artefacts.shelf import FILE_MODE, make_folder, parse_json, read_bounded, safe_name, take_owner_of, utc_now, write_atomically

if TYPE_CHECKING:
    from fixer.base.progress import Progress

SCHEMA = 1

WRITE_INTERVAL = 0.5
"""Seconds between two writings that only report progress."""


class Phase(Enum):
    """What a moefix does now."""

    STARTING = "starting"
    WAITING = "waiting"
    """Another moefix tunes on this volume."""
    ASKING = "asking"
    """SGLang is asked which file it looks for."""
    TUNING = "tuning"
    BENCHMARKING = "benchmarking"
    """`moefix bench` times the kernels or a server of its own."""
    DOWNLOADING = "downloading"
    """The weights are not there yet, and all else is done."""
    SERVING = "serving"
    """SGLang has the process: it may still be loading the model."""
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True)
class Share:
    """How far a piece of work is: `done` of `total`, in `unit` ("kernels", "bytes"); total 0 where it is not known."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class Status:
    """One process's state.

    Attributes:
        host, pid: whose.
        started, updated: UTC, as artefacts write it.
        phase: what it does now.
        detail: one line for a person: the phase's own words, or the fault.
        model, revision: the model, and the commit on the hub it was pinned to ("" for a folder).
        tuning, download: how far these are; None before they begin and where there is nothing to do.
        files: names of the tuning files that moefix installed.
        verdict: what SGLang's log said of them, "" until it has said so.
        url: the server's address for the health check, "" before it is one.
    """

    host: str
    pid: int
    started: str
    updated: str
    phase: Phase = Phase.STARTING
    detail: str = ""
    model: str = ""
    revision: str = ""
    tuning: Share | None = None
    download: Share | None = None
    files: tuple[str, ...] = ()
    verdict: str = ""
    url: str = ""

    def to_json(self) -> str:
        """The file's content, and what `moefix status --json` prints."""
        return json.dumps({"schema": SCHEMA, **asdict(self), "phase": self.phase.value}, indent=2) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> Status:
        """The state in a file's content.

        Raises:
            ValueError: it is not one.
        """
        row = parse_json(content)
        if not isinstance(row, dict) or row.pop("schema", None) != SCHEMA:
            raise ValueError("it is no state of a moefix of this kind")
        kinds = {field.name: field.type for field in fields(cls)}
        if set(row) != set(kinds):
            raise ValueError("its parts are not those of a state")
        row["phase"] = Phase(row["phase"])
        row["tuning"], row["download"] = _share(row["tuning"]), _share(row["download"])
        if not isinstance(row["pid"], int) or isinstance(row["pid"], bool) or not 0 < row["pid"] < 1 << 31:
            raise ValueError("its process id is none")
        if not isinstance(row["files"], list):
            raise ValueError("its files are no list")
        row["files"] = tuple(row["files"])
        texts = [*row["files"], *(row[name] for name, kind in kinds.items() if kind == "str")]
        if not all(isinstance(text, str) and len(text) <= 4096 and text.isprintable() for text in texts):
            raise ValueError("a text in it is none")
        return cls(**row)


def _share(row: Any) -> Share | None:
    if row is None:
        return None
    if not isinstance(row, dict) or set(row) != {"done", "total", "unit"} or not isinstance(row["unit"], str):
        raise ValueError("its progress makes no sense")
    for name in ("done", "total"):
        if not isinstance(row[name], int) or isinstance(row[name], bool) or not 0 <= row[name] < 1 << 60:
            raise ValueError("its progress makes no sense")
    return Share(**row)


def state_path(home: Path, host: str, pid: int) -> Path:
    """Where the state of that process is."""
    return home / "run" / f"{safe_name(host)}-{pid}.json"


def lock_path(state: Path) -> Path:
    """The lock of the process whose state is in that file."""
    return state.with_suffix(".lock")


def _hold(path: Path) -> int:
    """Take a process's lock for the rest of its life; -1 where that cannot be had, and then no lock file lies there."""
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
    except BlockingIOError:
        os.close(handle)  # another's, of the same name and process id: a container with this one's host name
        return -1
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
        self._lock = _hold(lock_path(self.path))

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
    began = utc_now()
    status = Status(socket.gethostname(), os.getpid(), began, began)
    board = Board(status, state_path(home, status.host, status.pid), now)
    board.live()
    current_states(home)
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


def states(home: Path) -> tuple[Status, ...]:
    """The state of every moefix that wrote one into this data folder and can be read, the newest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in (home / "run").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                found.append(Status.from_json(read_bounded(path)))
    return tuple(sorted(found, key=lambda status: (status.updated, status.started), reverse=True))


# --- reading them ----------------------------------------------------------------------------------------------------

KEPT_SECONDS = 24 * 3600.0
"""How long the state of a process that has ended is shown before its file is removed."""

HEALTH_SECONDS = 4.0
"""How long a server may take to answer /health."""

OVER = (Phase.ENDED, Phase.FAILED)


def current_states(home: Path) -> tuple[Status, ...]:
    """The states in a data folder as they are now: this host's first, the newest first.

    A process that is gone without a word has ended: one whose lock is free, or one of this host without a lock that
    does not run. Files of processes that ended long ago are removed.
    """
    here = socket.gethostname()
    found = []
    for status in states(home):
        now, path = status, state_path(home, status.host, status.pid)
        if status.phase not in OVER and not _lives(status, path, here):
            now = replace(status, phase=Phase.ENDED, detail=f"gone while {status.phase.value}")
        if now.phase in OVER and _age(status.updated) > KEPT_SECONDS:
            for file in (path, lock_path(path)):
                with contextlib.suppress(OSError):
                    file.unlink()
            continue
        found.append(now)
    return tuple(sorted(found, key=lambda status: status.host != here))


def _lives(status: Status, path: Path, here: str) -> bool:
    held = is_held(lock_path(path))
    if held is None:
        return status.host != here or is_alive(status.pid)
    return held


def _age(stamp: str) -> float:
    """Seconds since a time as artefacts write it; 0 for one that makes no sense."""
    try:
        then = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return 0.0
    return (datetime.now(timezone.utc) - then).total_seconds()


def is_alive(pid: int) -> bool:
    """Whether a process of that id runs moefix or SGLang: ids are used again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, IndexError):
        return False
    return state != "Z" and any(word in command for word in (b"moefix", b"entrypoint.py", b"sglang"))


def share_text(share: Share | None) -> str:
    """How far a piece of work is, in a few words; "" where nothing is known."""
    if share is None:
        return ""
    if share.total <= 0:
        return f"{share.done} {share.unit}"
    part = f"{100 * min(share.done, share.total) // share.total} %"
    return part if share.unit == "bytes" else f"{part}, {share.done} of {share.total} {share.unit}"


def summary(status: Status) -> str:
    """The phase and how far it is, in one line."""
    share = {Phase.TUNING: status.tuning, Phase.DOWNLOADING: status.download}.get(status.phase)
    parts = filter(None, (share_text(share), status.detail))
    rest = ", ".join(parts)
    return f"{status.phase.value}: {rest}" if rest else status.phase.value


def lines(status: Status) -> tuple[str, ...]:
    """A state for a person, one line each."""
    rows = (
        ("process", f"{status.pid} on {status.host}, since {status.started}"),
        ("phase", summary(status)),
        ("model", f"{status.model} at {status.revision}" if status.revision else status.model),
        ("tuned", share_text(status.tuning) if status.phase is not Phase.TUNING else ""),
        ("download", share_text(status.download) if status.phase is not Phase.DOWNLOADING else ""),
        *(("file", name) for name in status.files),
        ("verdict", status.verdict),
        ("server", status.url),
    )
    return tuple(f"{name:<9}{text}" for name, text in rows if text)


def health(home: Path, seconds: float = HEALTH_SECONDS) -> tuple[bool, str]:
    """Whether this host's server answers, and in one line what it does."""
    here = socket.gethostname()
    mine = [status for status in current_states(home) if status.host == here]
    # Whatever else runs beside the server (`moefix bench`, `moefix tune`): it is the server that is asked about.
    mine.sort(key=lambda status: (status.phase in OVER, status.phase is not Phase.SERVING or not status.url))
    status = mine[0] if mine else None
    if status is None:
        return False, "no moefix runs here with this data folder"
    if status.phase is not Phase.SERVING or not status.url:
        return False, summary(status)
    fault = _unhealthy(status.url, seconds)
    return (False, f"{summary(status)}; {fault}") if fault else (True, f"healthy: {status.url}")


def _unhealthy(url: str, seconds: float) -> str:
    """Why a server does not answer as it should, "" where it does. Its certificate is its own affair."""
    import http.client
    import ssl
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port
    try:
        connection = (
            http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl._create_unverified_context())  # noqa: S323
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=seconds)
        )
        try:
            connection.request("GET", "/health")
            code = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as fault:
        return f"{url} does not answer ({getattr(fault, 'strerror', None) or type(fault).__name__})"
    return "" if code == 200 else f"{url}/health answers {code}"
