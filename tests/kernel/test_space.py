from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.families.fused_moe.rules import DESCRIPTOR_TOKENS, descriptor_projections, makes_sense
from fixer.kernel.space import Space, Step, always_spills, distance, impossible_after
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload
from tests.support.moe_space import AXES, FAR_STEPS

QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
BLOCK = Workload(256, 256, 7168, 8, NumberFormat.FP8_W8A8, block_shape=(128, 128))
MIDDLE = Tile(64, 128, 128, 16, 8, 3)

in_space = st.builds(Tile, **{axis: st.sampled_from(values) for axis, values in AXES.items()})
anywhere = st.builds(
    Tile,
    block_m=st.sampled_from([8, 16, 64, 512]),
    block_n=st.sampled_from([16, 32, 128, 512]),
    block_k=st.sampled_from([32, 64, 256]),
    group_m=st.integers(1, 80),
    num_warps=st.sampled_from([1, 2, 4, 8, 16]),
    num_stages=st.integers(1, 8),
    use_tma=st.booleans(),
)


def test_the_space_is_sglangs_less_what_spills():
    everything = list(Space(QWEN).all())
    # 1920, less 256x256 with 8 warps and 128x256, 256x128 and 256x256 with 4: 4 of 40 pairs of blocks and warps
    assert len(everything) == 1920 * 36 // 40
    assert len(set(everything)) == len(everything)
    assert everything == list(Space(QWEN).all())
    assert not any(always_spills(tile) for tile in everything)


def test_block_wise_scales_bind_the_step_along_k():
    assert {tile.block_k for tile in Space(BLOCK).all()} == {64, 128}
    assert {tile.block_k for tile in Space(replace(BLOCK, block_shape=(128, 64))).all()} == {64}
    assert not Space(BLOCK).allows(replace(MIDDLE, block_k=256))
    assert Space(QWEN).allows(replace(MIDDLE, block_k=256))


@pytest.mark.parametrize(
    "tile", [Tile(128, 256, 64, 1, 4, 3), Tile(256, 256, 64, 1, 8, 3), replace(MIDDLE, use_tma=True)]
)
def test_what_is_not_allowed(tile):
    assert not Space(QWEN).allows(tile)


def test_neighbours_are_a_step_away_and_any_step_away_in_groups_and_stages():
    neighbours = set(Space(QWEN).neighbours(MIDDLE))
    assert neighbours == {
        *(replace(MIDDLE, block_m=size) for size in (32, 128)),
        *(replace(MIDDLE, block_n=size) for size in (64, 256)),
        *(replace(MIDDLE, block_k=size) for size in (64, 256)),
        *(replace(MIDDLE, group_m=size) for size in (1, 32, 64)),
        replace(MIDDLE, num_warps=4),
        *(replace(MIDDLE, num_stages=stages) for stages in (2, 4, 5)),
    }
    steps = dict(Space(QWEN).steps(MIDDLE))
    assert steps[Step("block_n", 128, 64)] == replace(MIDDLE, block_n=64)
    assert set(steps.values()) == neighbours


@given(in_space)
def test_inside_the_space_neighbours_know_each_other(tile):
    space = Space(BLOCK)
    for neighbour in space.neighbours(tile):
        assert space.allows(neighbour)
        changed = [axis for axis in AXES if getattr(neighbour, axis) != getattr(tile, axis)]
        assert len(changed) == 1
        if space.allows(tile):
            assert tile in space.neighbours(neighbour)


@given(anywhere)
def test_neighbours_of_any_shipped_tile_lie_on_the_axis_they_step_along(tile):
    neighbours = list(Space(QWEN).neighbours(tile))
    assert len(neighbours) == len(set(neighbours))
    for neighbour in neighbours:
        assert not neighbour.use_tma
        (axis,) = [axis for axis in AXES if getattr(neighbour, axis) != getattr(tile, axis)]
        value, step = getattr(tile, axis), getattr(neighbour, axis)
        assert step in AXES[axis]
        between = [other for other in AXES[axis] if min(value, step) < other < max(value, step)]
        assert axis in FAR_STEPS or not between


@pytest.mark.parametrize(
    ("tokens", "heights"),
    [
        (1, {16, 32}),  # a sixteenth of a token an expert
        (64, {16, 32, 64}),  # 4 tokens
        (512, {16, 32, 64, 128, 256}),  # 32 tokens
        (4096, {64, 128, 256}),  # 256 tokens
        (65536, {64, 128, 256}),  # 4096 tokens: a tall block is never too low
    ],
)
def test_block_heights_that_make_sense(tokens, heights):
    assert {m for m in AXES["block_m"] if makes_sense(replace(MIDDLE, block_m=m), QWEN, tokens)} == heights


@given(tokens=st.integers(1, 1 << 20), experts=st.integers(1, 512), top_k=st.integers(1, 16))
def test_some_height_always_makes_sense(tokens, experts, top_k):
    workload = Workload(experts, 64, 64, top_k)
    assert any(makes_sense(replace(MIDDLE, block_m=m), workload, tokens) for m in AXES["block_m"])


@pytest.mark.parametrize(
    ("changes", "hopeless"),
    [
        ({}, True),
        ({"block_m": 128}, True),
        ({"block_k": 256, "num_stages": 5}, True),
        ({"block_m": 32}, False),
        ({"block_m": 256, "block_n": 64}, False),
        ({"num_stages": 2}, False),
        ({"num_warps": 4}, False),
        ({"group_m": 32}, False),
    ],
)
def test_what_a_refused_tile_says_of_others(changes, hopeless):
    assert impossible_after(MIDDLE, replace(MIDDLE, **changes)) is hopeless


def test_gate_up_comes_before_down():
    assert BOTH == (Projection.GATE_UP, Projection.DOWN)


def test_the_distance_is_in_doublings_and_half_for_what_matters_less():
    assert distance(MIDDLE, MIDDLE) == 0
    assert distance(MIDDLE, replace(MIDDLE, block_m=16)) == 2
    assert distance(MIDDLE, replace(MIDDLE, block_n=256, num_warps=4)) == 2
    assert distance(MIDDLE, replace(MIDDLE, group_m=64, num_stages=5)) == 1.5
    other = Tile(16, 32, 256, 1, 4, 2)
    assert distance(MIDDLE, other) == distance(other, MIDDLE) == 2 + 2 + 1 + 1 + 1


def test_an_expert_parallel_rank_gets_its_share_of_the_tokens():
    alone, rank = replace(QWEN, experts=16), replace(QWEN, experts=16, ep_size=8)
    tall = Tile(256, 64, 64, 1, 8, 3)
    assert makes_sense(tall, alone, 64)
    assert [makes_sense(tall, rank, tokens) for tokens in (64, 512)] == [makes_sense(tall, QWEN, t) for t in (64, 512)]
    assert not makes_sense(tall, rank, 64)


# --- tensor descriptors

DOWN, EITHER = frozenset({Projection.DOWN}), frozenset(Projection)


@pytest.mark.parametrize(
    ("workload", "capability", "expected"),
    [
        (Workload(64, 1024, 2048, 8), (9, 0), EITHER),
        (BLOCK, (9, 0), EITHER),
        (BLOCK, (12, 0), EITHER),
        (BLOCK, (8, 9), frozenset()),  # no such hardware
        (QWEN, (9, 0), {Projection.GATE_UP}),  # a row's scale is read in token order
        (replace(QWEN, per_channel_quant=False), (9, 0), {Projection.GATE_UP}),
        (replace(BLOCK, ep_size=2), (9, 0), {Projection.GATE_UP}),  # rows elsewhere are zeroed in token order
        (Workload(64, 512, 2048, 8, NumberFormat.INT4_W4A16, group_size=128), (9, 0), frozenset()),  # another kernel
    ],
)
def test_where_descriptors_are_tried(workload, capability, expected):
    assert descriptor_projections(workload, capability, EITHER) == expected
    assert descriptor_projections(workload, capability, DOWN) == expected & DOWN
    assert descriptor_projections(workload, capability, frozenset()) == frozenset()


def test_descriptors_are_one_step_away_for_the_projection_that_may_have_them():
    space = Space(QWEN, DOWN)
    described = replace(MIDDLE, use_tma=True)
    assert space.allows(described, Projection.DOWN)
    assert not space.allows(described, Projection.GATE_UP)
    assert not space.allows(described)
    assert dict(space.steps(MIDDLE, Projection.DOWN))[Step("use_tma", 0, 1)] == described
    from_described = [tile for _, tile in space.steps(described, Projection.DOWN)]
    assert MIDDLE in from_described
    assert all(tile.use_tma for tile in from_described if tile != MIDDLE)
    assert not any(tile.use_tma for _, tile in space.steps(described, Projection.GATE_UP))


def test_descriptors_are_for_prefill_sizes():
    described = replace(MIDDLE, use_tma=True)
    assert makes_sense(described, QWEN, DESCRIPTOR_TOKENS) == makes_sense(MIDDLE, QWEN, DESCRIPTOR_TOKENS) is True
    assert not makes_sense(described, QWEN, DESCRIPTOR_TOKENS - 1)
