"""How a long piece of work tells what it does: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines of the same phase."""


class Progress(Protocol):
    """Where a piece of work reports to."""

    def phase(self, name: str, total: int) -> None:
        """A new phase begins; `total` steps are expected (it may grow)."""
        ...

    def advance(self, detail: str = "", total: int | None = None) -> None:
        """One step is done; `total` corrects what is expected."""
        ...

    def note(self, line: str) -> None:
        """One line that stays."""
        ...


class Silent:
    """Reports nothing."""

    def phase(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, detail: str = "", total: int | None = None) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""


@dataclass
class PlainLines:
    """One line a phase and one every few seconds, with an estimate of what is left; for logs."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _name: str = ""
    _total: int = 0
    _done: int = 0
    _began: float = 0.0
    _said: float = 0.0

    def phase(self, name: str, total: int) -> None:
        """Say what begins."""
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = time.monotonic()
        self.note(f"{name} ...")

    def advance(self, detail: str = "", total: int | None = None) -> None:
        """Count a step, and say so if the last line is some seconds old."""
        self._done += 1
        self._total = max(total or self._total, self._done)
        now = time.monotonic()
        if now - self._said >= PLAIN_INTERVAL:
            self._said = now
            left = (now - self._began) * (self._total - self._done) / self._done
            self.note(f"{self._name}: {self._done} of {self._total}, about {left:.0f} s left{detail and '; ' + detail}")

    def note(self, line: str) -> None:
        """Print a line."""
        print(f"moefix: {line}", file=self.stream, flush=True)


@contextmanager
def terminal_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, plain lines where standard error is none, nothing where it is to be quiet."""
    if quiet:
        yield Silent()
        return
    if not sys.stderr.isatty():
        yield PlainLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars)


class _Bar:
    """One bar at a time."""

    def __init__(self, bars: object) -> None:
        from rich.progress import Progress as Bars

        assert isinstance(bars, Bars)
        self._bars = bars
        self._task = bars.add_task("", total=None, detail="")

    def phase(self, name: str, total: int) -> None:
        self._bars.reset(self._task, description=name, total=total, detail="")

    def advance(self, detail: str = "", total: int | None = None) -> None:
        if total is not None:
            self._bars.update(self._task, total=total)
        self._bars.update(self._task, advance=1, detail=detail)

    def note(self, line: str) -> None:
        self._bars.console.print(f"moefix: {line}", markup=False, highlight=False)
