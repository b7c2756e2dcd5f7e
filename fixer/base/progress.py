"""How a long piece of work tells what it does: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def tell(line: str, stream: TextIO | None = None) -> None:
    """One of moefix's lines, on standard error if no stream is named. Nobody who hears it is no reason to stop.

    A reader that has gone, a full disk behind `2>`, and a closed standard error are that.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:  # Python's own answer to `2>&-`
        return
    with suppress(OSError, ValueError):
        print(f"moefix: {line}", file=stream, flush=True)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


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

    stream: TextIO | None = field(default_factory=lambda: sys.stderr)
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
        tell(line, self.stream)


@contextmanager
def terminal_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, plain lines where standard error is none, nothing where it is to be quiet."""
    if quiet:
        yield Silent()
        return
    if not _is_terminal(sys.stderr):
        yield PlainLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True) as bars:
        _screen.append(bars)
        try:
            yield _Bar(bars)
        finally:
            _screen.remove(bars)


_screen: list[RichProgress] = []
"""The bars that are on the terminal now, so that what else goes on can show itself under them."""


class _Bar:
    """One bar at a time."""

    def __init__(self, bars: object) -> None:
        from rich.progress import Progress as Bars

        assert isinstance(bars, Bars)
        self._bars = bars
        self._task = bars.add_task("", total=None, detail="", visible=False)

    def phase(self, name: str, total: int) -> None:
        self._bars.reset(self._task, description=name, total=total, detail="", visible=True)

    def advance(self, detail: str = "", total: int | None = None) -> None:
        if total is not None:
            self._bars.update(self._task, total=total)
        self._bars.update(self._task, advance=1, detail=detail)

    def note(self, line: str) -> None:
        self._bars.console.print(f"moefix: {line}", markup=False, highlight=False)


RATE_WINDOW = 10.0
"""Seconds over which a rate is taken."""


class Transfer:
    """Tells how far a transfer is while other work goes on: a bar under the other work's on a terminal, else lines.

    Args:
        name: what is going on ("download").
        quiet: tell nothing.
        stream: where the lines go.
        now: the monotonic clock, in seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._quiet, self._now = name, quiet, now
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._samples: deque[tuple[float, int]] = deque()
        self._said = now()
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def update(self, done: int, total: int) -> None:
        """Bytes that are there, of how many."""
        now = self._now()
        self._samples.append((now, done))
        while self._samples[0][0] < now - RATE_WINDOW and len(self._samples) > 2:
            self._samples.popleft()
        if self._quiet:
            return
        if _is_terminal(self._stream):
            self._show(done, total)
        elif now - self._said >= PLAIN_INTERVAL:
            self._said = now
            tell(self.line(done, total), self._stream)

    def line(self, done: int, total: int) -> str:
        """How far it is, in one line."""
        (since, before), (now, last) = self._samples[0], self._samples[-1]
        rate = (last - before) / (now - since) if now > since else 0.0
        left = f", about {(total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._name}: {gigabytes(done)[:-3]} of {gigabytes(total)}, {rate / 1e6:.0f} MB/s{left}"

    def _show(self, done: int, total: int) -> None:
        bars = next(iter(_screen), None)
        if bars is None:
            return
        if self._bars is not bars or self._task is None:
            self._bars, self._task = bars, bars.add_task(f"{self._name} (MB)", total=None, detail="")
        bars.update(self._task, completed=done // 10**6, total=max(1, total // 10**6))


def gigabytes(count: int) -> str:
    """A number of bytes for people: "12.3 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e9:.3f} GB"
