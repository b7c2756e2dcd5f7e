"""The terminal to print tables on, or a plain one where output goes into a file."""

from __future__ import annotations

from rich.console import Console

PLAIN_WIDTH = 200
"""Columns where the output is no terminal: wide enough that no line is broken."""


def plain_or_terminal() -> Console:
    """A console on stdout that breaks no lines where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH, soft_wrap=True)
