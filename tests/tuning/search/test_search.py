from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.families.fused_moe.rules import DESCRIPTOR_TOKENS, makes_sense
from fixer.kernel.space import Space, impossible_after
from fixer.tuning.search.prediction import Prediction
from fixer.tuning.search.search import Limits, Pair, Search
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import BOTH, Kernel, NumberFormat, Projection, Tile, Workload
from tests.support.moe_space import AXES

QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8)
MIXTRAL = Workload(8, 14336, 4096, 2)
BLOCKWISE = Workload(257, 256, 7168, 9, NumberFormat.FP8_W8A8, block_shape=(128, 128))
ROWS = (1, 16, 256, 4096)
SEEDS = (
    Tile(16, 64, 128, 1, 4, 4),
    Tile(32, 64, 128, 1, 4, 3),
    Tile(64, 128, 64, 16, 4, 3),
    Tile(128, 128, 64, 1, 8, 3),
)


class Landscape:
    """Times that are a product of one random factor for each value of each axis, sliding with M; a memory limit."""

    def __init__(self, seed: int, limit: int = 1 << 30) -> None:
        draw = random.Random(seed)
        self._factors = {
            (projection, axis, value, end): draw.uniform(0, 0.3)
            for projection in BOTH
            for axis, values in AXES.items()
            for value in values
            for end in (0, 1)
        }
        self._limit = limit

    def fits(self, tile: Tile) -> bool:
        return tile.num_stages * tile.block_k * (tile.block_m + tile.block_n) <= self._limit

    def time(self, kernel: Kernel, tokens: int) -> float:
        share = math.log2(tokens) / 13
        total = 0.0
        for axis in AXES:
            value = getattr(kernel.tile, axis)
            for end, weight in ((0, 1 - share), (1, share)):
                total += weight * self._factors[kernel.projection, axis, value, end]
        return 100 * math.exp(total)

    def best(self, workload: Workload, tokens: int) -> float:
        tiles = [t for t in Space(workload).all() if self.fits(t) and makes_sense(t, workload, tokens)]
        heights = {tile.block_m for tile in tiles}
        return min(
            sum(min(self.time(Kernel(p, t), tokens) for t in tiles if t.block_m == height) for p in BOTH)
            for height in heights
        )


def rounds_of(search: Search, landscape: Landscape) -> Iterator[list[Kernel]]:
    while kernels := search.next_kernels():
        yield kernels
        for kernel in kernels:
            if not landscape.fits(kernel.tile):
                search.told(Build(kernel, Outcome.TOO_MUCH_SHARED_MEMORY))
                continue
            search.told(Build(kernel, Outcome.OK))
            for tokens in search.sensible_rows(kernel.tile):
                time = landscape.time(kernel, tokens)
                search.timed(Timing(kernel, tokens, time, time, 3))


def finished(workload: Workload, landscape: Landscape, rows: Sequence[int] = ROWS, **more: object) -> Search:
    search = Search(workload, rows, SEEDS, **more)  # type: ignore[arg-type]
    for _ in rounds_of(search, landscape):
        pass
    return search


@pytest.mark.parametrize("limit", [1 << 30, 100_000, 60_000])
@pytest.mark.parametrize("workload", [QWEN, MIXTRAL, BLOCKWISE])
def test_a_separable_landscape_is_nearly_solved(limit: int, workload: Workload) -> None:
    regrets = []
    for seed in range(3):
        landscape = Landscape(seed, limit)
        search = finished(workload, landscape)
        assert search.asked <= Limits().kernels
        regrets += [search.best_pairs(m)[0].microseconds / landscape.best(workload, m) for m in ROWS]
    assert math.prod(regrets) ** (1 / len(regrets)) <= 1.03  # each axis alone changes the time by up to 35 %
    assert max(regrets) <= 1.2


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), kernels=st.integers(1, 120))
def test_rounds_repeat_nothing_keep_the_budget_and_are_the_same_each_time(seed: int, kernels: int) -> None:
    landscape = Landscape(seed, 60_000)
    runs = []
    for _ in range(2):
        search = Search(BLOCKWISE, ROWS, SEEDS, limits=Limits(kernels=kernels))
        refused: list[Kernel] = []
        asked: list[Kernel] = []
        for kernels_of_round in rounds_of(search, landscape):
            for kernel in kernels_of_round:
                assert Space(BLOCKWISE).allows(kernel.tile)
                assert not any(
                    r.projection is kernel.projection and impossible_after(r.tile, kernel.tile) for r in refused
                )
            asked += kernels_of_round
            refused += [kernel for kernel in kernels_of_round if not landscape.fits(kernel.tile)]
        assert len(asked) == len(set(asked)) == search.asked <= kernels
        runs.append(asked)
    assert runs[0] == runs[1]


def test_a_block_of_every_sensible_height_is_tried_though_no_seed_has_it() -> None:
    first = Search(QWEN, (1, 4096), (SEEDS[0],)).next_kernels()
    heights = {kernel.tile.block_m for kernel in first}
    assert heights == {16, 32, 64, 128, 256}
    only_small = Search(QWEN, (1,), (SEEDS[0],)).next_kernels()
    assert {kernel.tile.block_m for kernel in only_small} == {16, 32}


def test_sglangs_own_choice_comes_first_and_its_tma_never() -> None:
    own = Tile(64, 32, 64, 8)
    first = Search(QWEN, ROWS, SEEDS, must=(replace(own, use_tma=True), own)).next_kernels()
    assert first[0].tile == own
    assert not any(kernel.tile.use_tma for kernel in first)


def test_what_does_not_fit_comes_back_with_fewer_stages() -> None:
    search = Search(QWEN, ROWS, SEEDS)
    first = search.next_kernels()
    too_large = Kernel(Projection.GATE_UP, SEEDS[0])
    assert too_large in first
    for kernel in first:
        is_refused = kernel == too_large
        search.told(Build(kernel, Outcome.TOO_MUCH_SHARED_MEMORY if is_refused else Outcome.OK))
        for tokens in [] if is_refused else search.sensible_rows(kernel.tile):
            search.timed(Timing(kernel, tokens, 10.0, 10.0, 3))
    assert search.next_kernels()[0] == Kernel(Projection.GATE_UP, replace(SEEDS[0], num_stages=3))


def test_it_stops_where_nothing_more_is_gained() -> None:
    class Flat(Landscape):
        def time(self, kernel: Kernel, tokens: int) -> float:
            return 10.0

    limits = Limits(kernels=1500)
    search = Search(QWEN, ROWS, SEEDS, limits=limits)
    assert len(list(rounds_of(search, Flat(0)))) <= 1 + limits.patience
    assert search.next_kernels() == []


@pytest.mark.parametrize("projection", BOTH)
def test_one_projection_alone(projection: Projection) -> None:
    search = finished(QWEN, Landscape(3), projections=(projection,))
    assert {kernel.projection for kernel in search._asked} == {projection}
    assert set(search.best_pairs(1)[0].tiles) == {projection}


def test_nothing_fits() -> None:
    search = finished(QWEN, Landscape(3, limit=0))
    assert search.best_pairs(1) == []
    assert search.asked < 200


def test_an_unknown_shape_rules_a_height_out_only_after_it_has_proven_hopeless() -> None:
    class Padding(Landscape):
        def time(self, kernel: Kernel, tokens: int) -> float:
            return super().time(kernel, tokens) * (2 if kernel.tile.block_m > 64 else 1)

    search = Search(QWEN, (1,), SEEDS, shape_known=False)
    assert search.sensible_rows(Tile(128, 64, 64, 1)) == [1]
    list(rounds_of(search, Padding(5)))
    assert search.sensible_rows(Tile(128, 64, 64, 1)) == []
    assert search.sensible_rows(search.best_pairs(1)[0].tiles[Projection.DOWN]) == [1]


def timing(projection: Projection, tile: Tile, microseconds: float, replays: int = 3) -> Timing:
    return Timing(Kernel(projection, tile), 1, microseconds, microseconds, replays)


def test_pairs_share_their_height_and_closer_looks_go_to_the_near_ones() -> None:
    search = Search(QWEN, (1,), ())
    low, tall, spare = Tile(16, 64, 64, 1), Tile(32, 64, 64, 1), Tile(16, 128, 64, 1)
    for projection, tile, time in (
        (Projection.GATE_UP, low, 10.0),
        (Projection.GATE_UP, spare, 10.1),
        (Projection.DOWN, low, 9.0),
        (Projection.GATE_UP, tall, 5.0),
        (Projection.DOWN, tall, 30.0),
    ):
        search.timed(timing(projection, tile, time))
    best = Pair({Projection.GATE_UP: low, Projection.DOWN: low}, 19.0)
    assert [pair.microseconds for pair in search.best_pairs(1)] == [19.0, 35.0]
    assert search.best_pairs(1)[0] == best
    near = {kernel for kernel, _ in search.close_calls(0.03, 5)}
    assert near == {Kernel(Projection.GATE_UP, low), Kernel(Projection.GATE_UP, spare), Kernel(Projection.DOWN, low)}
    search.timed(timing(Projection.GATE_UP, low, 12.0, replays=5))
    search.timed(timing(Projection.GATE_UP, low, 1.0, replays=3))  # an older, shorter look
    assert search.best_pairs(1)[0].microseconds == pytest.approx(19.1)


@given(mean=st.floats(-2, 2), deviation=st.floats(0.004, 0.3))
def test_expected_gain_grows_with_uncertainty_and_with_promise(mean: float, deviation: float) -> None:
    gain = Prediction(mean, deviation).expected_gain(1.0)
    assert 0 <= gain <= Prediction(mean, deviation * 1.1).expected_gain(1.0) + 1e-4
    assert gain <= Prediction(mean - 0.1, deviation).expected_gain(1.0)


def test_tall_blocks_make_sense_however_many_tokens_an_expert_has() -> None:
    heights = [m for m in AXES["block_m"] if makes_sense(Tile(m, 64, 64, 1), MIXTRAL, 16384)]
    assert heights == [64, 128, 256]


# --- one file for both projections


def test_a_joint_search_tries_every_tile_for_both_and_chooses_the_best_sum() -> None:
    landscape = Landscape(7)
    search = finished(QWEN, landscape, joint=True)
    by_tile: dict[Tile, set[Projection]] = {}
    for kernel in search._asked:
        by_tile.setdefault(kernel.tile, set()).add(kernel.projection)
    assert all(len(projections) == 2 for projections in by_tile.values())
    for tokens in ROWS:
        pair = search.best_pairs(tokens)[0]
        assert len(set(pair.tiles.values())) == 1
        sums = [
            sum(landscape.time(Kernel(projection, tile), tokens) for projection in BOTH)
            for tile in by_tile
            if landscape.fits(tile) and tokens in search.sensible_rows(tile)
        ]
        assert pair.microseconds == pytest.approx(min(sums))


def test_a_joint_search_looks_closer_at_both_halves_of_what_is_near() -> None:
    search = Search(QWEN, (1,), (), joint=True)
    good, near, half = Tile(16, 64, 64, 1), Tile(16, 128, 64, 1), Tile(16, 32, 64, 1)
    for projection, tile, time in (
        (Projection.GATE_UP, good, 10.0),
        (Projection.DOWN, good, 9.0),
        (Projection.GATE_UP, near, 9.0),
        (Projection.DOWN, near, 10.1),
        (Projection.GATE_UP, half, 1.0),  # never timed for the other
    ):
        search.timed(timing(projection, tile, time))
    assert search.best_pairs(1) == [Pair({Projection.GATE_UP: good, Projection.DOWN: good}, 19.0)]
    wanted = search.close_calls(0.01, 7)
    assert set(wanted) == {(Kernel(projection, tile), 1) for projection in BOTH for tile in (good, near)}


# --- tensor descriptors


def test_descriptors_are_tried_where_they_are_allowed_and_from_prefill_sizes_on() -> None:
    search = finished(QWEN, Landscape(5), descriptors=frozenset({Projection.DOWN}))
    described = [kernel for kernel in search._asked if kernel.tile.use_tma]
    assert {kernel.projection for kernel in described} == {Projection.DOWN}
    assert all(min(search.sensible_rows(kernel.tile)) >= DESCRIPTOR_TOKENS for kernel in described)
    for tokens in ROWS:
        assert not any(tile.use_tma for pair in search.best_pairs(tokens, plain=True) for tile in pair.tiles.values())
    assert not any(kernel.tile.use_tma for kernel in finished(QWEN, Landscape(5))._asked)
