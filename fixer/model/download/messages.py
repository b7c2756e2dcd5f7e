"""The messages between moefix and its downloading process."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Request:
    """What to fetch.

    Attributes:
        name: the repository, "owner/name".
        revision: as the user gave it; None for the default branch.
        commit: what the revision stands for; None where that is still to be asked.
        load_format: SGLang's.
        download_dir: SGLang's cache of its own for weights; None for the client's.
        code: fetch the model's Python files too.
    """

    name: str
    revision: str | None
    commit: str | None
    load_format: str
    download_dir: str | None = None
    code: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be fetched: the commit; how many files; bytes that are there, of how many; where to."""

    commit: str
    files: int
    done: int
    total: int
    folder: str


@dataclass(frozen=True)
class Bytes:
    """How far it is."""

    done: int
    total: int


@dataclass(frozen=True)
class Trouble:
    """What went wrong, and after how many seconds it is tried again; 0 where nothing but waiting helps."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Done:
    """Every file is there.

    Attributes:
        commit: the commit.
        files: paths of all files, in the caches' snapshot folders.
    """

    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """It ended without all files; `lasting` where another attempt could not help."""

    message: str
    hint: str
    exit_code: int
    lasting: bool


Message = Plan | Bytes | Trouble | Done | Failed


Tell = Callable[[Message], None]


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Plan, Bytes, Trouble, Done, Failed)}


def to_line(message: Message) -> str:
    """A message as a line of JSON."""
    return json.dumps({"say": type(message).__name__, **asdict(message)}) + "\n"


def from_line(line: str) -> Message | None:
    """The message in a line; None where it is none."""
    with suppress(ValueError, TypeError, KeyError):
        row = json.loads(line)
        kind = _KINDS[row.pop("say")]
        values = {field.name: row[field.name] for field in fields(kind)}
        message: Message = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        return message
    return None
