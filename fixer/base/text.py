"""Make somebody else's text fit for one line of a terminal or a log, without secrets."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"hf_[A-Za-z0-9_]{4,}|(?i:bearer|basic)\s+\S+|(?<=//)[^/@\s]+(?=@)"
    # SGLang's arguments, as Python writes them: api_key='...' up to 0.5.17, 'api_key': '...' in 0.5.23.
    r"|(?i:(?<=key=)|(?<=key': )|(?<=password=)|(?<=password': ))"
    r"""(?:'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?)"""
    r"|(?i:(?<=token=)|(?<=key=))[^&\s]+"
)
"""What somebody else's text may hold and nobody should read: access tokens, keys, a password in an address."""


def told(error: BaseException, most: int = 300) -> str:
    """Somebody else's error in one line: its name and its first line, without tokens or unprintable characters."""
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return harmless(f"{type(error).__name__}: {first}" if first else type(error).__name__)[:most]


def harmless(text: str) -> str:
    """A text of somebody else's without tokens, passwords in addresses, and unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in _TOKEN.sub("***", text))
