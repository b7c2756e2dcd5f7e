"""The name of one file: a value that cannot lead out of the folder that it is put into."""

from __future__ import annotations

import os
from dataclasses import dataclass

MOST_NAME_BYTES = 255
"""The longest name that Linux's file systems take."""


@dataclass(frozen=True)
class FileName:
    """A checked file name, for `folder / name`.

    Attributes:
        text: printable, in UTF-8, 1 to 255 bytes, without slashes and backslashes, neither "." nor "..".

    Raises:
        ValueError: on construction, where it is not such a name: "../x", "a/b", "/etc/x", "a\\0b".
    """

    text: str

    def __post_init__(self) -> None:
        plain = self.text.isprintable() and not {"/", "\\"} & set(self.text) and self.text not in {"", ".", ".."}
        if not (plain and len(os.fsencode(self.text)) <= MOST_NAME_BYTES):
            raise ValueError(f"{self.text[:80]!r} is no file name")

    def __fspath__(self) -> str:
        return self.text

    def __str__(self) -> str:
        return self.text
