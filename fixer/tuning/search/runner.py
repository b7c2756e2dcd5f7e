"""How to measure: the interface that a search is run against, with a card or a recording behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fixer.tuning.search.search import Search
from fixer.tuning.search.trials import Build, Timing
from fixer.workload import Kernel


@dataclass(frozen=True)
class Request:
    """Compile a kernel and look at it once for each of some rows."""

    kernel: Kernel
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """What a request came to; `timings` is empty unless the build is OK, and lacks the rows that failed."""

    build: Build
    timings: tuple[Timing, ...] = ()


More = Callable[[], Sequence["Request"]]
"""Asks the search for another round, with what it has been told so far; nothing where it has none."""


class Runner(Protocol):
    """Measures kernels. Answers come in the order in which they are ready."""

    def look(self, requests: Sequence[Request], more: More | None = None) -> Iterator[Look]:
        """Compile each kernel and take a short look at its rows; one answer a request.

        Args:
            more: a runner may ask for the next round before this one is done, so that no processor waits for the
                round's slowest kernel; those are answered too.
        """
        ...

    def closer(self, wanted: Iterable[tuple[Kernel, int]], replays: int) -> Iterator[Timing]:
        """Time kernels that have been looked at again, with more replays; what fails has no answer."""
        ...


CLOSER_LOOKS = ((0.04, 5), (0.008, 11), (0.004, 25))
"""Halving: (how near to the row's best, replays it then gets). Replays are spent where a row is still open.

First looks are seconds apart, and at large M the card's clock moves by 3 % in that time (an H100 that waits for the
compiler and one that is busy), so that the first stage, whose kernels run in turn, takes in more than that."""

Observer = Callable[[Look], None]


def run_rounds(search: Search, runner: Runner, on_look: Observer | None = None) -> None:
    """Rounds of looks, until the search has nothing more to ask."""

    def next_round() -> list[Request]:
        return [Request(kernel, tuple(search.sensible_rows(kernel.tile))) for kernel in search.next_kernels()]

    while requests := next_round():
        for look in runner.look(requests, next_round):
            search.told(look.build)
            for timing in look.timings:
                search.timed(timing)
            if on_look is not None:
                on_look(look)


def look_closer(search: Search, runner: Runner) -> None:
    """Ever closer looks at ever fewer candidates."""
    for within, replays in CLOSER_LOOKS:
        for timing in runner.closer(search.close_calls(within, replays), replays):
            search.timed(timing)


def run_search(search: Search, runner: Runner, on_look: Observer | None = None) -> None:
    """Run a search to its end."""
    run_rounds(search, runner, on_look)
    look_closer(search, runner)
