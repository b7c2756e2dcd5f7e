"""What to try next. Pure: it is told what was measured and says what to compile and what to time more closely.

Seeds first, then one-step neighbours of each row's best, in rounds. Which neighbours: those with the greatest expected
improvement, where what a step brings is learnt from every pair of measured tiles that the same step separates. The
products of a family have files of their own but share BLOCK_SIZE_M, so a row's choice is the set of tiles with the
least sum among those of equal BLOCK_SIZE_M.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fixer.families.registry import family_of
from fixer.kernel.space import Space, Step, impossible_after
from fixer.tuning.search.prediction import CROWDED_GROUP, PRIORS, Prediction, effect_of, together
from fixer.tuning.search.seeds import anchors
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import AnyWorkload, Kernel, Projection, RowTiles, Tile


@dataclass(frozen=True)
class Limits:
    """When to stop, and how large the rounds are.

    Attributes:
        seeds: configurations of the first round, for each projection (SGLang's own and the coverage may make it more).
        round_size: kernels of a later round; several per core of the machine, so that few wait for the slowest.
        kernels: the most kernels to compile, over all projections.
        least_gain: the search ends when `patience` rounds together improve the rows' geometric mean by less.
        patience: see least_gain.
    """

    seeds: int = 36
    round_size: int = 40
    kernels: int = 260
    least_gain: float = 0.0005
    patience: int = 4


@dataclass(frozen=True)
class Pair:
    """A row's choice and its time in microseconds, all products together."""

    tiles: Mapping[Projection, Tile]
    microseconds: float

    @property
    def row(self) -> RowTiles:
        """The tiles in the order of the products."""
        return RowTiles(*self.tiles.values())


NEAR = 0.06
"""Tiles within this of the best of their BLOCK_SIZE_M (in logarithm) have their neighbours considered, ..."""
FEW = 3
"""... and no more than so many of them."""
NEAR_PAIR = 1.15
"""A BLOCK_SIZE_M whose best pair is further from the row's best is not worked on."""
EVIDENCE = 0.4
"""Tiles slower than the best by more than this (in logarithm) teach nothing of what steps do near the best."""

MANY_ROWS = 1.5
"""Gains of several rows add up by this power: with 1, many small rows would drown out a large one's 2 %."""

FAIR_SHARE = 0.5
"""Share of a round that goes to each row's own best hope in turn."""

OF_EACH_HEIGHT = 4
PLAIN_OF_EACH_HEIGHT = 3
"""Of each sensible BLOCK_SIZE_M the first round has at least so many seeds, and so many plain configurations."""

CLOSEST = 6
"""No more kernels than this, of one row, projection and BLOCK_SIZE_M, get a closer look."""

HOPELESS_HEIGHT = 1.3
"""A BLOCK_SIZE_M whose best of several pairs is slower by this factor is not timed for the row any more."""
SEVERAL = 3


@dataclass
class Search:
    """The state of one search.

    Args:
        workload: whose kernels.
        rows: the batch sizes M to choose for.
        seeds: configurations, the most promising first.
        must: configurations that are tried whatever they seem worth (SGLang's own).
        projections: which products are timed, all of the family's where none is named (a recording may have one only).
        descriptors: the projections that may load through tensor descriptors.
        joint: one configuration serves both projections, as in releases that read one file.
        shape_known: False where the workload's E, N and top-k are a guess: then only what was timed rules rows out.
    """

    workload: AnyWorkload
    rows: Sequence[int]
    seeds: Sequence[Tile]
    must: Sequence[Tile] = ()
    limits: Limits = field(default_factory=Limits)
    projections: Sequence[Projection] = ()
    shape_known: bool = True
    descriptors: frozenset[Projection] = frozenset()
    joint: bool = False

    def __post_init__(self) -> None:
        self._family = family_of(self.workload)
        self.projections = self.projections or self._family.products
        self._space = Space(self.workload, self.descriptors)
        self._asked: dict[Kernel, None] = {}
        self._refused: dict[Kernel, None] = {}
        self._repaired: set[Kernel] = set()
        self._times: dict[tuple[Projection, int], dict[Tile, Timing]] = defaultdict(dict)
        self._hopeless: dict[int, frozenset[int]] = {}
        self._scores: list[float] = []
        self._started = False
        self._finished = False

    @property
    def asked(self) -> int:
        """Kernels asked for so far."""
        return len(self._asked)

    def sensible_rows(self, tile: Tile) -> list[int]:
        """The rows that a tile is worth timing for, the smallest first."""
        return [tokens for tokens in sorted(self.rows) if self._makes_sense(tile, tokens)]

    def _makes_sense(self, tile: Tile, tokens: int) -> bool:
        if tile.block_m in self._hopeless.get(tokens, ()):
            return False
        return not self.shape_known or self._family.makes_sense(tile, self.workload, tokens)

    # ---- what is learnt

    def told(self, build: Build) -> None:
        """Learn how a kernel's compilation ended."""
        self._asked.setdefault(build.kernel)
        if build.outcome is Outcome.TOO_MUCH_SHARED_MEMORY:
            self._refused.setdefault(build.kernel)

    def timed(self, timing: Timing) -> None:
        """Learn a time; one from more replays replaces one from fewer."""
        times = self._times[timing.kernel.projection, timing.tokens]
        known = times.get(timing.kernel.tile)
        if known is None or timing.replays >= known.replays:
            times[timing.kernel.tile] = timing

    # ---- what to try

    def next_kernels(self) -> list[Kernel]:
        """The next round, the most promising first; empty when the search is over."""
        if self._finished:
            return []
        if not self._started:
            self._started = True
            return self._ask(self._first_round(), self.limits.kernels)
        self._scores.append(self._score())
        self._hopeless = {tokens: self._hopeless_heights(tokens) for tokens in self.rows}
        room = self._room()
        kernels = [] if self._is_stale() else self._ask(self._repairs(), room // 2)
        kernels += [] if self._is_stale() else self._ask(self._ranked_neighbours(), room - len(kernels))
        self._finished = not kernels
        return kernels

    def _room(self) -> int:
        """Kernels of the next round: a rest too small for a round of its own is added to the last."""
        left = max(0, self.limits.kernels - self.asked)
        return left if left <= self.limits.round_size * 1.3 else self.limits.round_size

    def _is_stale(self) -> bool:
        if len(self._scores) <= self.limits.patience:
            return False
        return self._scores[-1] > self._scores[-1 - self.limits.patience] * (1 - self.limits.least_gain)

    def _first_round(self) -> list[Kernel]:
        """SGLang's own, some of every sensible BLOCK_SIZE_M, then the seeds in their order."""
        seeds = [tile for tile in self.seeds if self.sensible_rows(tile)]
        tiles = dict.fromkeys(tile for tile in self.must if not tile.use_tma)
        for block_m in self._family.axis["block_m"].values:
            tiles.update(dict.fromkeys([tile for tile in seeds if tile.block_m == block_m][:OF_EACH_HEIGHT]))
            tiles.update(dict.fromkeys(self._plain(block_m, seeds)))
        room = max(0, self.limits.seeds - len(tiles))
        tiles.update(dict.fromkeys([tile for tile in seeds if tile not in tiles][:room]))
        return [Kernel(projection, tile) for tile in tiles for projection in self.projections]

    def _plain(self, block_m: int, seeds: Sequence[Tile]) -> list[Tile]:
        """Plain configurations of a height, more of them where the seeds have few."""
        plain = [tile for tile in anchors(self.workload, block_m) if self.sensible_rows(tile)]
        missing = OF_EACH_HEIGHT - sum(tile.block_m == block_m for tile in seeds)
        return plain[: max(PLAIN_OF_EACH_HEIGHT, missing)]

    def _ask(self, kernels: Iterable[Kernel], room: int) -> list[Kernel]:
        fresh: list[Kernel] = []
        for kernel in dict.fromkeys(kernels):
            if len(fresh) >= room:
                break
            if (
                kernel not in fresh
                and kernel not in self._asked
                and not self._cannot_fit(kernel)
                and self.sensible_rows(kernel.tile)
            ):
                fresh.append(kernel)
                fresh += [half for half in self._other_half(kernel) if half not in self._asked]
        self._asked.update(dict.fromkeys(fresh))
        return fresh

    def _cannot_fit(self, kernel: Kernel) -> bool:
        return any(
            refused.projection is kernel.projection and impossible_after(refused.tile, kernel.tile)
            for refused in self._refused
        )

    def _repairs(self) -> Iterator[Kernel]:
        """For what did not fit, the same with fewer stages: what won on a larger card often wins so on a smaller."""
        for refused in [kernel for kernel in self._refused if kernel not in self._repaired]:
            self._repaired.add(refused)
            fewer = [
                stages
                for stages in reversed(self._family.axis["num_stages"].values)
                if stages < refused.tile.num_stages
            ]
            for stages in fewer:
                repaired = Kernel(refused.projection, replace(refused.tile, num_stages=stages))
                if repaired in self._asked:
                    break
                if not self._cannot_fit(repaired):
                    yield repaired
                    break

    def _other_half(self, kernel: Kernel) -> list[Kernel]:
        """What is worth nothing without a kernel: the same tile for the other projection where one serves both."""
        return [replace(kernel, projection=p) for p in self.projections if self.joint and p is not kernel.projection]

    def _ranked_neighbours(self) -> list[Kernel]:
        """Neighbours of the rows' best by expected gain: over all rows, and half a round by each row in turn."""
        by_row = [self._row_gains(tokens) for tokens in sorted(self.rows)]
        total: dict[Kernel, float] = defaultdict(float)
        for gains in by_row:
            for kernel, gain in gains.items():
                total[kernel] += gain**MANY_ROWS
        order = _descending(total)
        if len(self._scores) <= 1:
            return order
        shared = round(self.limits.round_size * (1 - FAIR_SHARE))
        return [*order[:shared], *_in_turn([_descending(gains) for gains in by_row]), *order]

    # ---- what a neighbour is expected to bring

    def _row_gains(self, tokens: int) -> dict[Kernel, float]:
        """The expected gain of every untried neighbour of a row's good tiles, as a fraction of the row's time."""
        pairs = self.best_pairs(tokens)
        if not pairs:
            return {}
        best, gains = pairs[0].microseconds, {}
        heights = [_height(pair) for pair in pairs if pair.microseconds <= best * NEAR_PAIR]
        if self.joint:
            return self._joint_gains(tokens, heights, best)
        for projection in self.projections:
            for tile, predictions in self._predictions(projection, tokens, heights).items():
                target = best - self._other(projection, tokens, tile.block_m)
                if target > 0:
                    gain = together(predictions).expected_gain(target) * target / best
                    gains[Kernel(projection, tile)] = gain
        return {kernel: gain for kernel, gain in gains.items() if gain > 0}

    def _joint_gains(self, tokens: int, heights: Sequence[int], best: float) -> dict[Kernel, float]:
        """The same where one tile serves both projections: what it is expected to gain over the best sum."""
        by_tile: dict[Tile, list[Prediction]] = defaultdict(list)
        for projection in self.projections:
            for tile, predictions in self._predictions(projection, tokens, heights).items():
                by_tile[tile].append(together(predictions))
        gains = {}
        for tile, halves in by_tile.items():
            if len(halves) == len(self.projections):  # else one of them was tried and failed
                total = math.log(sum(math.exp(half.mean) for half in halves))
                gain = Prediction(total, max(half.deviation for half in halves)).expected_gain(best)
                gains.update({Kernel(projection, tile): gain for projection in self.projections if gain > 0})
        return gains

    def _predictions(self, projection: Projection, tokens: int, heights: Sequence[int]) -> dict[Tile, list[Prediction]]:
        """One prediction for each good tile that a neighbour is one step from."""
        times = {tile: math.log(t.microseconds) for tile, t in self._times[projection, tokens].items()}
        seen = self._evidence(times, projection)
        predictions: dict[Tile, list[Prediction]] = defaultdict(list)
        worth = {tile: math.log(us) for tile, us in self._joint_times(tokens).items()} if self.joint else times
        for block_m in heights:
            ranked = sorted((tile for tile in worth if tile.block_m == block_m), key=lambda tile: worth[tile])
            for tile in [tile for tile in ranked[:FEW] if worth[tile] <= worth[ranked[0]] + NEAR]:
                for step, neighbour in self._space.steps(tile, projection):
                    if self._is_open(Kernel(projection, neighbour), tokens):
                        effect = effect_of(self._prior(step, neighbour, tokens), tile, seen.get(step, ()))
                        predictions[neighbour].append(Prediction(times[tile] + effect.mean, effect.deviation))
        return predictions

    def _is_open(self, kernel: Kernel, tokens: int) -> bool:
        return kernel not in self._asked and self._makes_sense(kernel.tile, tokens)

    def _evidence(self, times: Mapping[Tile, float], projection: Projection) -> dict[Step, list[tuple[Tile, float]]]:
        """By step: the tiles from which it was taken, and the change of the logarithm of the time."""
        limit = min(times.values(), default=0.0) + EVIDENCE
        seen: dict[Step, list[tuple[Tile, float]]] = defaultdict(list)
        for tile, time in times.items():
            if time <= limit:
                for step, neighbour in self._space.steps(tile, projection):
                    if neighbour in times:
                        seen[step].append((tile, times[neighbour] - time))
        return seen

    def _prior(self, step: Step, tile: Tile, tokens: int) -> Prediction:
        if step.axis == "group_m" and self._family.block_rows(self.workload, tokens) > tile.block_m:
            return CROWDED_GROUP
        return PRIORS[step.axis]

    def _other(self, projection: Projection, tokens: int, block_m: int) -> float:
        """The least time of the other projection with a BLOCK_SIZE_M, in microseconds; hopeful where none is known."""
        total = 0.0
        for other in self.projections:
            if other is not projection:
                times = self._times[other, tokens]
                same = [timing.microseconds for tile, timing in times.items() if tile.block_m == block_m]
                total += min(same) if same else 0.9 * min((t.microseconds for t in times.values()), default=0.0)
        return total

    # ---- where it stands

    def _score(self) -> float:
        """The geometric mean of the rows' best times."""
        logs = [math.log(pairs[0].microseconds) for tokens in self.rows if (pairs := self.best_pairs(tokens))]
        return math.exp(sum(logs) / len(logs)) if logs else math.inf

    def _hopeless_heights(self, tokens: int) -> frozenset[int]:
        """The BLOCK_SIZE_M that were tried several times for a row and are far off."""
        pairs = self.best_pairs(tokens)
        return frozenset(
            _height(pair)
            for pair in pairs
            if pair.microseconds > HOPELESS_HEIGHT * pairs[0].microseconds
            and all(self._tried(projection, tokens, _height(pair)) >= SEVERAL for projection in self.projections)
        )

    def _tried(self, projection: Projection, tokens: int, block_m: int) -> int:
        return sum(tile.block_m == block_m for tile in self._times[projection, tokens])

    def best_pairs(self, tokens: int, *, plain: bool = False) -> list[Pair]:
        """The best pair of each BLOCK_SIZE_M for a row, the fastest first; empty where nothing was timed.

        Args:
            plain: leave out what loads through tensor descriptors.
        """
        if self.joint:
            return self._joint_pairs(tokens)
        best: dict[int, dict[Projection, Timing]] = defaultdict(dict)
        for projection in self.projections:
            for tile, timing in self._times[projection, tokens].items():
                if plain and tile.use_tma:
                    continue
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

    def _joint_pairs(self, tokens: int) -> list[Pair]:
        best: dict[int, Pair] = {}
        for tile, microseconds in self._joint_times(tokens).items():
            known = best.get(tile.block_m)
            if known is None or microseconds < known.microseconds:
                best[tile.block_m] = Pair(dict.fromkeys(self.projections, tile), microseconds)
        return sorted(best.values(), key=lambda pair: pair.microseconds)

    def _joint_times(self, tokens: int) -> dict[Tile, float]:
        """Each tile's time for all projections together, in microseconds, where all were timed."""
        parts = [self._times[projection, tokens] for projection in self.projections]
        tiles = [tile for tile in parts[0] if all(tile in part for part in parts)]
        return {tile: sum(part[tile].microseconds for part in parts) for tile in tiles}

    def medians(self, tokens: int) -> dict[Kernel, float]:
        """Every kernel's time for a row, in microseconds a launch."""
        of_row = (self._times[projection, tokens] for projection in self.projections)
        return {timing.kernel: timing.microseconds for times in of_row for timing in times.values()}

    def close_calls(self, within: float, replays: int) -> list[tuple[Kernel, int]]:
        """What deserves a closer look: (kernel, row) that could be in the row's best pair, timed too little so far.

        Args:
            within: how far above the best, as a fraction, still counts as near.
            replays: what has this many replays is well enough known.
        """
        wanted: dict[tuple[Kernel, int], None] = {}
        for tokens in self.rows:
            for plain in (False, True) if self.descriptors else (True,):
                pairs = self.best_pairs(tokens, plain=plain)
                for pair in pairs:
                    slack = pairs[0].microseconds * (1 + within) - pair.microseconds
                    for projection in self.projections if slack >= 0 else ():
                        near = self._near(projection, tokens, pair.tiles[projection], slack, replays)
                        wanted.update(dict.fromkeys(near))
        return list(wanted)

    def _near(
        self, projection: Projection, tokens: int, best: Tile, slack: float, replays: int
    ) -> list[tuple[Kernel, int]]:
        times = self._times[projection, tokens]
        if self.joint:
            worth = self._joint_times(tokens)
            near_tiles = sorted((t for t in worth if worth[t] <= worth[best] + slack), key=lambda tile: worth[tile])
            close = [times[tile] for tile in near_tiles if tile.block_m == best.block_m][:CLOSEST]
            return [(timing.kernel, tokens) for timing in close if timing.replays < replays]
        limit = times[best].microseconds + slack
        same = [t for tile, t in times.items() if (tile.block_m, tile.use_tma) == (best.block_m, best.use_tma)]
        near = [t for t in same if t.microseconds <= limit]
        nearest = sorted(near, key=lambda timing: timing.microseconds)[:CLOSEST]
        return [(timing.kernel, tokens) for timing in nearest if timing.replays < replays]


def _height(pair: Pair) -> int:
    """The BLOCK_SIZE_M that a pair shares."""
    return next(iter(pair.tiles.values())).block_m


def _descending(gains: Mapping[Kernel, float]) -> list[Kernel]:
    """Kernels by gain, ties in a fixed order."""
    return sorted(gains, key=lambda kernel: (-gains[kernel], kernel.projection.value, kernel.tile))


def _in_turn(lists: Sequence[Sequence[Kernel]]) -> Iterator[Kernel]:
    """The first of each list, then the second of each, and so on."""
    for index in range(max(map(len, lists), default=0)):
        for kernels in lists:
            if index < len(kernels):
                yield kernels[index]
