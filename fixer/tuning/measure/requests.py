"""What the measuring process is asked, and how it answers. One process a card; see `process.ChildProcess`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fixer.machine.worker import Handler
from fixer.tuning.duel import DuelRequest, KernelDuel
from fixer.tuning.measure.card_bench import Bench, Setup
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel

LOOK_REPLAYS = 3
"""Replays of a first, short look."""


@dataclass(frozen=True)
class LookAt:
    """Load a kernel, check it, and look at rows; `best` has each row's best so far in microseconds."""

    kernel: Kernel
    rows: tuple[int, ...]
    best: Mapping[int, float]


@dataclass(frozen=True)
class TimeCloser:
    """Time one loaded kernel for one row with more replays."""

    kernel: Kernel
    tokens: int
    replays: int


Measurement = LookAt | TimeCloser | DuelRequest


def measuring_handler(setup: Setup) -> Handler:
    """Build the card's tensors (in the child) and give the function that answers."""
    os.environ["TRITON_CACHE_DIR"] = str(setup.cache)
    bench = Bench(setup)

    def handle(request: Measurement) -> Look | Timing | Build | KernelDuel:
        if isinstance(request, DuelRequest):
            return bench.duel(request.tokens, request.own, request.tuned)
        build = bench.load(request.kernel)
        if isinstance(request, TimeCloser):
            return (
                build
                if build.outcome is not Outcome.OK
                else bench.time(request.kernel, request.tokens, request.replays)
            )
        if build.outcome is not Outcome.OK:
            return Look(build)
        timings = (
            bench.time(request.kernel, tokens, LOOK_REPLAYS, request.best.get(tokens)) for tokens in request.rows
        )
        return Look(build, tuple(timings))

    return handle
