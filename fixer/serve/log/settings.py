"""What the relay is told at its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fixer.serve.log.verdict import Expected


@dataclass(frozen=True)
class Settings:
    """What the reader is told.

    Attributes:
        expected: what moefix did, for the verdict.
        card: the card's name, for explanations.
        quiet: say only what must be known.
        state: the server's state file (`fixer.base.status_board`), "" for none.
        record: path of the file that keeps a name that SGLang asked for (`fixer.serve.asked`), "" for none.
        question: the rest of that file's content.
    """

    expected: Expected = field(default_factory=Expected)
    card: str = ""
    quiet: bool = False
    state: str = ""
    record: str = ""
    question: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the relay's standard input."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` wrote."""
        row = json.loads(text)
        return cls(**{**row, "expected": Expected.from_json(row["expected"])})
