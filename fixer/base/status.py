"""The record of one run: phase, shares, files and verdict, as other processes read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from fixer.base.data_folder import DataFolder
from fixer.base.files import safe_name
from fixer.base.json_reading import parse_json

SCHEMA = 1


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
        run: the run's id, the name of its file; "" makes one for this host and process id alone (earlier versions).
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
    run: str = ""

    def __post_init__(self) -> None:
        if not self.run:
            object.__setattr__(self, "run", f"{safe_name(self.host)}-{self.pid}")

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
        row.setdefault("run", "")
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


def state_path(home: Path, run: str) -> Path:
    """Where the state of that run is."""
    return DataFolder(home).run / f"{safe_name(run)}.json"


def lock_path(state: Path) -> Path:
    """The lock of the process whose state is in that file."""
    return state.with_suffix(".lock")
