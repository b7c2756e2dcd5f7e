"""What a moefix at work says of itself to `moefix status`, to a health check and to whoever shares its data folder.

Each process has a file of its own, `run/<host>-<process id>.json` in the data folder, replaced in one step. The server
that moefix becomes keeps the process id, and with it the file: from then on the log's relay writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from fixer.errors import StoreError
from fixer.store import parse_json, read_bounded, safe_name, utc_now, write_atomically

SCHEMA = 1

WRITE_INTERVAL = 0.5
"""Seconds between two writings that only report progress."""


class Phase(Enum):
    """What a moefix does now."""

    STARTING = "starting"
    WAITING = "waiting"
    """Another moefix tunes on this volume."""
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


class Board:
    """This process's state, kept in its file. Writing it never fails: a server is worth more than a note about it.

    Args:
        home: the data folder.
        now: the monotonic clock, in seconds.
    """

    def __init__(self, home: Path, now: Callable[[], float] = time.monotonic) -> None:
        began = utc_now()
        self.status = Status(socket.gethostname(), os.getpid(), began, began)
        self.path = state_path(home, self.status.host, self.status.pid)
        self._now = now
        self._written = float("-inf")
        self._write()

    def update(self, **changes: Any) -> None:
        """Change some of the state's parts (see `Status`) and write it.

        Progress alone (`tuning`, `download`, `detail`) is written at most every half second.
        """
        self.status = replace(self.status, **changes, updated=utc_now())
        hurry = not changes.keys() <= {"tuning", "download", "detail"}
        if hurry or self._now() - self._written >= WRITE_INTERVAL:
            self._write()

    def _write(self) -> None:
        self._written = self._now()
        with contextlib.suppress(StoreError):
            write_atomically(self.path, self.status.to_json().encode())


def states(home: Path) -> tuple[Status, ...]:
    """The state of every moefix that wrote one into this data folder and can be read, the newest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in (home / "run").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                found.append(Status.from_json(read_bounded(path)))
    return tuple(sorted(found, key=lambda status: status.updated, reverse=True))
