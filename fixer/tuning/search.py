"""What to try next. Pure: it is told what was measured and says what to compile and what to time more closely.

Seeds first, then one-step neighbours of each row's best, in rounds, until a round brings less than 0.1 %. The
gate-up and down projections have files of their own but share BLOCK_SIZE_M, so a row's choice is the pair with the
least sum among pairs of equal BLOCK_SIZE_M.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fixer.workload import Projection, Tile, Workload

from .space import BOTH, Space, impossible_after, makes_sense
from .trials import Build, Kernel, Outcome, Timing


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        seeds: configurations of the first round, for each projection.
        kernels: the most kernels to compile, over both projections.
        least_gain: a round that improves the rows' geometric mean by less than this fraction is the last.
    """

    seeds: int = 56
    kernels: int = 290
    least_gain: float = 0.001


@dataclass(frozen=True)
class Pair:
    """A row's choice and its time in microseconds, both projections together."""

    tiles: Mapping[Projection, Tile]
    microseconds: float


@dataclass
class Search:
    """The state of one search.

    Args:
        workload: whose kernels.
        rows: the batch sizes M to choose for.
        seeds: configurations, the most promising first.
        must: configurations that are tried whatever they seem worth (SGLang's own).
        projections: which projections are timed (a recording may have one only).
    """

    workload: Workload
    rows: Sequence[int]
    seeds: Sequence[Tile]
    must: Sequence[Tile] = ()
    limits: Limits = field(default_factory=Limits)
    projections: Sequence[Projection] = BOTH

    def __post_init__(self) -> None:
        self._space = Space(self.workload)
        self._asked: dict[Kernel, None] = {}
        self._refused: list[Kernel] = []
        self._times: dict[tuple[Projection, int], dict[Tile, Timing]] = defaultdict(dict)
        self._started = False
        self._last_score = math.inf
        self._finished = False

    @property
    def asked(self) -> int:
        """Kernels asked for so far."""
        return len(self._asked)

    def sensible_rows(self, tile: Tile) -> list[int]:
        """The rows that a tile is worth timing for, the smallest first."""
        return [tokens for tokens in self.rows if makes_sense(tile, self.workload, tokens)]

    def told(self, build: Build) -> None:
        """Learn how a kernel's compilation ended."""
        self._asked.setdefault(build.kernel)
        if build.outcome is Outcome.TOO_MUCH_SHARED_MEMORY:
            self._refused.append(build.kernel)

    def timed(self, timing: Timing) -> None:
        """Learn a time; one from more replays replaces one from fewer."""
        times = self._times[timing.kernel.projection, timing.tokens]
        known = times.get(timing.kernel.tile)
        if known is None or timing.replays >= known.replays:
            times[timing.kernel.tile] = timing

    def next_kernels(self) -> list[Kernel]:
        """The next round, the most promising first; empty when the search is over."""
        if self._finished:
            return []
        if not self._started:
            self._started = True
            return self._ask(self._first_round(), self.limits.kernels)
        score = self._score()
        if self._last_score < math.inf and score > self._last_score * (1 - self.limits.least_gain):
            self._finished = True
            return []
        self._last_score = score
        room = self.limits.kernels - self.asked
        kernels = self._ask(self._ranked_neighbours(), room)
        self._finished = not kernels
        return kernels

    def _first_round(self) -> list[Kernel]:
        tiles = [tile for tile in self.seeds if self.sensible_rows(tile)][: self.limits.seeds]
        must = [tile for tile in self.must if not tile.use_tma]
        return [Kernel(projection, tile) for tile in dict.fromkeys([*must, *tiles]) for projection in self.projections]

    def _ask(self, kernels: Iterable[Kernel], room: int) -> list[Kernel]:
        fresh = [
            kernel
            for kernel in dict.fromkeys(kernels)
            if kernel not in self._asked and not self._cannot_fit(kernel) and self.sensible_rows(kernel.tile)
        ][: max(0, room)]
        self._asked.update(dict.fromkeys(fresh))
        return fresh

    def _cannot_fit(self, kernel: Kernel) -> bool:
        return any(
            refused.projection is kernel.projection and impossible_after(refused.tile, kernel.tile)
            for refused in self._refused
        )

    def _ranked_neighbours(self) -> list[Kernel]:
        """Neighbours of the rows' best, those that serve many rows first."""
        votes: Counter[Kernel] = Counter()
        for tokens in self.rows:
            for rank, pair in enumerate(self.best_pairs(tokens)[:2]):
                for projection, tile in pair.tiles.items():
                    for neighbour in self._space.neighbours(tile):
                        if makes_sense(neighbour, self.workload, tokens):
                            votes[Kernel(projection, neighbour)] += 2 - rank
        return [kernel for kernel, _ in votes.most_common()]

    def _score(self) -> float:
        """The geometric mean of the rows' best times."""
        logs = [math.log(pairs[0].microseconds) for tokens in self.rows if (pairs := self.best_pairs(tokens))]
        return math.exp(sum(logs) / len(logs)) if logs else math.inf

    def best_pairs(self, tokens: int) -> list[Pair]:
        """The best pair of each BLOCK_SIZE_M for a row, the fastest first; empty where nothing was timed."""
        best: dict[int, dict[Projection, Timing]] = defaultdict(dict)
        for projection in self.projections:
            for tile, timing in self._times[projection, tokens].items():
                known = best[tile.block_m].get(projection)
                if known is None or timing.microseconds < known.microseconds:
                    best[tile.block_m][projection] = timing
        pairs = [
            Pair(
                {projection: timing.kernel.tile for projection, timing in timings.items()},
                sum(timing.microseconds for timing in timings.values()),
            )
            for timings in best.values()
            if len(timings) == len(self.projections)
        ]
        return sorted(pairs, key=lambda pair: pair.microseconds)

    def close_calls(self, within: float, replays: int) -> list[tuple[Kernel, int]]:
        """What deserves a closer look: (kernel, row) that could be in the row's best pair, timed too little so far.

        Args:
            within: how far above the best, as a fraction, still counts as near.
            replays: what has this many replays is well enough known.
        """
        wanted = []
        for tokens in self.rows:
            pairs = self.best_pairs(tokens)
            for pair in pairs:
                slack = pairs[0].microseconds * (1 + within) - pair.microseconds
                if slack < 0:
                    continue
                for projection in self.projections:
                    wanted += self._near(projection, tokens, pair.tiles[projection], slack, replays)
        return wanted

    def _near(
        self, projection: Projection, tokens: int, best: Tile, slack: float, replays: int
    ) -> list[tuple[Kernel, int]]:
        times = self._times[projection, tokens]
        limit = times[best].microseconds + slack
        return [
            (timing.kernel, tokens)
            for tile, timing in times.items()
            if tile.block_m == best.block_m and timing.microseconds <= limit and timing.replays < replays
        ]
