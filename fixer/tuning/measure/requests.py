"""What the measuring process is asked, and how it answers. One process a card; see `process.ChildProcess`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fixer.kernel.compile import Target
from fixer.machine.worker import Handler
from fixer.tuning.duel import DuelRequest, KernelDuel
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, Workload

LOOK_REPLAYS = 3
"""Replays of a first, short look; fewer where they take long."""


@dataclass(frozen=True)
class Setup:
    """What the measuring process needs to know.

    Attributes:
        workload: the layer.
        target: SGLang's kernel and the card's architecture.
        cache: Triton's cache folder, where the compiling processes leave their work.
        server_cache: Triton's cache folder of the server, where its driver and launchers are built.
        device: CUDA's index among the visible devices.
        rows: every M that will be timed.
        shared_limit: bytes of shared memory a block may use.
        descriptors: the projections that may load through tensor descriptors.
        seed: of all random numbers.
    """

    workload: Workload
    target: Target
    cache: Path
    server_cache: Path
    device: int
    rows: tuple[int, ...]
    shared_limit: int
    descriptors: frozenset[Projection] = frozenset()
    seed: int = 20260


@dataclass(frozen=True)
class LookAt:
    """Load a kernel, check it, and look at rows; `best` has each row's best so far in microseconds."""

    kernel: Kernel
    rows: tuple[int, ...]
    best: Mapping[int, float]


@dataclass(frozen=True)
class TimeCloser:
    """Time kernels for one row in turn, with more replays."""

    kernels: tuple[Kernel, ...]
    tokens: int
    replays: int


Measurement = LookAt | TimeCloser | DuelRequest


def measuring_handler(setup: Setup) -> Handler:
    """Build the card's tensors (in the child) and give the function that answers."""
    os.environ["TRITON_CACHE_DIR"] = str(setup.cache)
    from fixer.tuning.measure.card_bench import Bench

    bench = Bench(setup)

    def handle(request: Measurement) -> Look | tuple[Timing, ...] | Build | KernelDuel:
        if isinstance(request, DuelRequest):
            return bench.duel(request.tokens, request.own, request.tuned)
        if isinstance(request, TimeCloser):
            usable = [kernel for kernel in request.kernels if bench.load(kernel).outcome is Outcome.OK]
            return bench.time_together(usable, request.tokens, request.replays) if usable else ()
        build = bench.load(request.kernel)
        if build.outcome is not Outcome.OK:
            return Look(build)
        return Look(build, tuple(bench.look(request.kernel, tokens, request.best[tokens]) for tokens in request.rows))

    return handle
