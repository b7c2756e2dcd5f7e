"""The file names that SGLang itself asked for, kept so that the next start tunes exactly those.

A record holds for one model, card, SGLang and the flags that decide a file's name. It comes from the server's log,
where SGLang asked for another file than the rules had worked out, or from asking SGLang beforehand
(`fixer.serve.asking`). One that SGLang contradicts again is replaced. Reading and writing need the standard
library only, for the log's relay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.base.data_folder import DataFolder
from fixer.base.files import Damaged, check_file_name, read_or_set_aside, safe_name, utc_now, write_atomically
from fixer.base.json_reading import parse_json

if TYPE_CHECKING:
    pass

SCHEMA = 1


@dataclass(frozen=True)
class Question:
    """For what a record holds.

    Attributes:
        model: the name, as the user gave it.
        config: a hash of config.json with the user's overrides, so that another model under the same name is another.
        card: as the driver writes it.
        sglang: SGLang's version.
        flags: the flags that count and are not SGLang's defaults, as "name=value", in order.
    """

    model: str
    config: str
    card: str
    sglang: str
    flags: str


@dataclass(frozen=True)
class Asked:
    """What SGLang asked for.

    Attributes:
        question: for what this holds.
        gate_up, down: the names; both "" where SGLang looks for none, `down` "" where the release has one joint file.
        source: "log" or "asking".
        created: UTC.
        ran: where SGLang looks for none: what runs the experts.
    """

    question: Question
    gate_up: str
    down: str
    source: str
    created: str
    ran: str = ""

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> Asked:
        """The record in a file that may be damaged.

        Raises:
            ValueError: it is none.
        """
        row = parse_json(content)
        if not isinstance(row, dict) or row.pop("schema", None) != SCHEMA:
            raise ValueError("it is no record of an asked-for file")
        question = row.pop("question", None)
        if not isinstance(question, dict) or set(question) != {field.name for field in fields(Question)}:
            raise ValueError("it does not say for what it holds")
        names = {field.name for field in fields(cls)} - {"question"}
        if set(row) != names or not all(_is_text(text) for text in (*row.values(), *question.values())):
            raise ValueError("its parts are not those of a record")
        for name in filter(None, (row["gate_up"], row["down"])):
            check_file_name(name)
        if row["down"] and not row["gate_up"]:
            raise ValueError("it has a down file without a gate-up file")
        return cls(question=Question(**question), **row)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and (value.isprintable() or not value)


def record_path(home: Path, question: Question) -> Path:
    """Where the record of that question is: asked/<model>-<hash>.json."""
    digest = hashlib.sha256(json.dumps(asdict(question), sort_keys=True).encode()).hexdigest()[:16]
    return DataFolder(home).asked / f"{safe_name(question.model.rstrip('/').rpartition('/')[2])[:60]}-{digest}.json"


def keep(home: Path, asked: Asked) -> Path:
    """Keep a record, in place of an older one of the same question.

    Raises:
        StoreError: it cannot be written.
    """
    path = record_path(home, asked.question)
    write_atomically(path, asked.to_json().encode())
    return path


def keep_name(path: Path, question: Mapping[str, Any], gate_up: str, down: str) -> None:
    """Keep names that the log spoke of, at a path worked out before.

    Raises:
        StoreError: it cannot be written.
        ValueError: a name is no plain file name.
    """
    asked = Asked(Question(**question), check_file_name(gate_up), down and check_file_name(down), "log", utc_now())
    write_atomically(path, asked.to_json().encode())


def find(home: Path, question: Question) -> tuple[Asked | None, Damaged | None]:
    """The kept record of a question; a damaged one is set aside and reported."""
    asked, damaged = read_or_set_aside(record_path(home, question), Asked.from_json)
    return (asked if asked is not None and asked.question == question else None), damaged
