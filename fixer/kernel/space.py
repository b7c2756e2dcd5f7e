"""The configurations that can be tried: the whole space, what a workload allows of it, a tile's neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from fixer.kernel.arguments import ElementType, operand_types
from fixer.workload import NumberFormat, Projection, Tile, Workload

AXES: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "group_m": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
"""SGLang's own tuning space (its tuning script's `get_configs_compute_bound`), 1920 configurations."""


DESCRIPTOR_TOKENS = 256
"""Tensor descriptors are tried from this M on. Gains are reported at prefill sizes (10 to 28 %), and NaN at M = 1 and 2
(on another card)."""

FAR_STEPS = ("group_m", "num_stages")
"""Axes along which every other value is one step away: their landscape has valleys (128x128x128 with 4 warps gets
slower from 3 stages to 4 and 1 % faster with 5, on an H100 at M = 1536)."""


@dataclass(frozen=True)
class Step:
    """One move along one axis of the space."""

    axis: str
    before: int
    after: int


@dataclass(frozen=True)
class Space:
    """What a workload allows of the space.

    Attributes:
        workload: block-wise scales bind BLOCK_SIZE_K: a step along K must stay within one block's scale.
        descriptors: the projections that may load through tensor descriptors; see `descriptor_projections`.
    """

    workload: Workload
    descriptors: frozenset[Projection] = frozenset()

    def allows(self, tile: Tile, projection: Projection | None = None) -> bool:
        """Whether a tile computes the right result and can be fast (a spilling accumulator never is).

        Args:
            projection: None for either, which then has no descriptors.
        """
        if always_spills(tile) or (tile.use_tma and projection not in self.descriptors):
            return False
        block_shape = self.workload.block_shape
        return block_shape is None or block_shape[1] % tile.block_k == 0

    def all(self) -> Iterator[Tile]:
        """Every allowed configuration, in a stable order."""
        for block_m, block_n, block_k, group_m, num_warps, num_stages in product(*AXES.values()):
            tile = Tile(block_m, block_n, block_k, group_m, num_warps, num_stages)
            if self.allows(tile):
                yield tile

    def steps(self, tile: Tile, projection: Projection | None = None) -> Iterator[tuple[Step, Tile]]:
        """The allowed configurations one step away, each with the step that leads to it."""
        if projection in self.descriptors:
            yield Step("use_tma", int(tile.use_tma), int(not tile.use_tma)), replace(tile, use_tma=not tile.use_tma)
        for axis, values in AXES.items():
            value = getattr(tile, axis)
            for after in _one_step_away(axis, value, values):
                neighbour = replace(tile, **{axis: after}, use_tma=tile.use_tma and projection in self.descriptors)
                if self.allows(neighbour, projection):
                    yield Step(axis, value, after), neighbour

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """The allowed configurations one step along one axis away."""
        return (neighbour for _, neighbour in self.steps(tile))


def _one_step_away(axis: str, value: int, values: tuple[int, ...]) -> list[int]:
    """The next smaller and the next larger value of an axis (a shipped file's value may lie between)."""
    smaller = [other for other in values if other < value]
    larger = [other for other in values if other > value]
    return [*smaller, *larger] if axis in FAR_STEPS else [*smaller[-1:], *larger[:1]]


def descriptor_projections(
    workload: Workload, capability: tuple[int, int], taken: frozenset[Projection]
) -> frozenset[Projection]:
    """The projections that are worth trying with tensor descriptors.

    Args:
        capability: the card's; descriptors are hardware from 9.0 on.
        taken: what the release takes them for (`Tree.takes_descriptors`).

    The down product then reads its rows in sorted order, scales included. Of one scale a row or a tensor SGLang makes
    something else there (a row's is read in token order, a tensor's is taken over the padding too), and rows of experts
    on other ranks are zeroed in token order: such layers come out wrong, so they are not tried (0.5.17 and 0.5.18,
    fused_moe_triton_kernels.py: `a_desc`, `write_zeros_to_output`).
    """
    if capability < (9, 0) or workload.group_size or workload.number_format is NumberFormat.FLOAT32:
        return frozenset()
    sorts = workload.ep_size == 1 and (workload.number_format is NumberFormat.NONE or workload.block_shape is not None)
    return frozenset(p for p in taken if p is Projection.GATE_UP or sorts)


def distance(a: Tile, b: Tile) -> float:
    """How far two tiles lie apart: 1 for each doubling of a block size or of the warps, 0.5 for what matters less."""
    blocks = sum(
        abs(math.log2(mine / other))
        for mine, other in ((a.block_m, b.block_m), (a.block_n, b.block_n), (a.block_k, b.block_k))
    )
    minor = abs(a.num_stages - b.num_stages) + (a.group_m != b.group_m)
    return blocks + (a.num_warps != b.num_warps) + 0.5 * minor


TALL = 64
"""Blocks of at least so many rows are never too low: with hundreds of tokens an expert the weights stay in L2 anyway,
and a block's height is bounded by registers and shared memory (Mixtral at M = 4096 has 1024 tokens an expert)."""


def tokens_per_expert(workload: Workload, tokens: int) -> float:
    """The mean number of tokens of an expert under uniform routing: M * top_k over the experts of all ranks."""
    return tokens * workload.top_k / (workload.experts * workload.ep_size)


def makes_sense(tile: Tile, workload: Workload, tokens: int) -> bool:
    """Whether a block of BLOCK_SIZE_M rows can be a good fit for M = `tokens`.

    An expert gets t tokens on average (`tokens_per_expert`). A block many times taller computes padding, one many times
    lower loads the expert's weights over and over. In the H100 landscape the best block height is never more
    than 16 t (32 where t is below 2) and never less than t / 4; the margins leave room for skewed routing.
    """
    if tile.use_tma and tokens < DESCRIPTOR_TOKENS:
        return False
    mean = tokens_per_expert(workload, tokens)
    return min(mean / 4, TALL) <= tile.block_m <= max(32.0, 16 * mean)


def impossible_after(refused: Tile, tile: Tile) -> bool:
    """Whether a tile needs at least the shared memory of one that was compiled and did not fit.

    Shared memory grows with each block size and with the number of stages, all else equal; so what did not fit says
    something of its larger relatives, and no formula is needed.
    """
    return (
        tile.num_warps == refused.num_warps
        and tile.group_m == refused.group_m
        and tile.use_tma == refused.use_tma
        and tile.block_m >= refused.block_m
        and tile.block_n >= refused.block_n
        and tile.block_k >= refused.block_k
        and tile.num_stages >= refused.num_stages
    )


def always_spills(tile: Tile) -> bool:
    """Whether the float32 accumulator alone needs more than the 255 registers that a thread can have."""
    return tile.block_m * tile.block_n > 255 * 32 * tile.num_warps


LAST_RESORTS = 4
"""The smallest configurations of the space, tried where nothing that won anywhere fits."""


def last_resorts(workload: Workload) -> tuple[Tile, ...]:
    """The configurations of the whole space that need least, for a limit that nothing else fits."""
    return tuple(sorted(Space(workload).all(), key=lambda tile: (least_bytes(tile, workload), tile))[:LAST_RESORTS])


def least_bytes(tile: Tile, workload: Workload) -> int:
    """About the least shared memory that a tile can need: the operands of all pipeline stages but one.

    Only an order for what to compile: whether a tile fits is what the compiler says (facts.md: the formula is exact
    for 98 % of FP8 tiles on sm_89 and too low for the others).
    """
    activation, weight = operand_types(workload)
    rows = tile.block_m * ElementType(activation).itemsize
    columns = tile.block_n * ElementType(weight).itemsize
    return max(1, tile.num_stages - 1) * tile.block_k * (rows + columns)
