"""The configurations that can be tried: the whole space, what a workload allows of it, a tile's neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from fixer.families.family import Family
from fixer.families.registry import family_of
from fixer.workload import AnyWorkload, Axis, Projection, Tile


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
        workload: its family has the axes, and says what computes the right result.
        descriptors: the products that may load through tensor descriptors (`Family.descriptors`).
    """

    workload: AnyWorkload
    descriptors: frozenset[Projection] = frozenset()

    @cached_property
    def _family(self) -> Family:
        return family_of(self.workload)

    def allows(self, tile: Tile, projection: Projection | None = None) -> bool:
        """Whether a tile computes the right result and can be fast (a spilling accumulator never is).

        Args:
            projection: None for either, which then has no descriptors.
        """
        if always_spills(tile) or (tile.use_tma and projection not in self.descriptors):
            return False
        return self._family.allows(tile, self.workload)

    def all(self) -> Iterator[Tile]:
        """Every allowed configuration, in a stable order."""
        axes = self._family.axes
        for values in product(*(axis.values for axis in axes)):
            chosen: dict[str, Any] = {axis.name: value for axis, value in zip(axes, values, strict=True)}
            tile = Tile(**chosen)
            if self.allows(tile):
                yield tile

    def steps(self, tile: Tile, projection: Projection | None = None) -> Iterator[tuple[Step, Tile]]:
        """The allowed configurations one step away, each with the step that leads to it."""
        if projection in self.descriptors:
            yield Step("use_tma", int(tile.use_tma), int(not tile.use_tma)), replace(tile, use_tma=not tile.use_tma)
        for axis in self._family.axes:
            value = getattr(tile, axis.name)
            for after in _one_step_away(axis, value):
                changes: dict[str, Any] = {axis.name: after}
                neighbour = replace(tile, **changes, use_tma=tile.use_tma and projection in self.descriptors)
                if self.allows(neighbour, projection):
                    yield Step(axis.name, value, after), neighbour

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """The allowed configurations one step along one axis away."""
        return (neighbour for _, neighbour in self.steps(tile))


def _one_step_away(axis: Axis, value: int) -> list[int]:
    """The next smaller and the next larger value of an axis (a shipped file's value may lie between)."""
    smaller = [other for other in axis.values if other < value]
    larger = [other for other in axis.values if other > value]
    return [*smaller, *larger] if axis.far else [*smaller[-1:], *larger[:1]]


def distance(a: Tile, b: Tile) -> float:
    """How far two tiles lie apart: 1 for each doubling of a block size or of the warps, 0.5 for what matters less."""
    blocks = sum(
        abs(math.log2(mine / other))
        for mine, other in ((a.block_m, b.block_m), (a.block_n, b.block_n), (a.block_k, b.block_k))
    )
    minor = abs(a.num_stages - b.num_stages) + (a.group_m != b.group_m)
    return blocks + (a.num_warps != b.num_warps) + 0.5 * minor


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


def last_resorts(workload: AnyWorkload) -> tuple[Tile, ...]:
    """The configurations of the whole space that need least, for a limit that nothing else fits."""
    return tuple(sorted(Space(workload).all(), key=lambda tile: (least_bytes(tile, workload), tile))[:LAST_RESORTS])


def least_bytes(tile: Tile, workload: AnyWorkload) -> int:
    """About the least shared memory that a tile can need: the operands of all pipeline stages but one.

    Only an order for what to compile: whether a tile fits is what the compiler says (facts.md: the formula is exact
    for 98 % of FP8 tiles on sm_89 and too low for the others).
    """
    activation, weight = family_of(workload).element_bytes(workload)
    depth = max(1, tile.num_stages - 1) * tile.block_k
    return depth * (tile.block_m * activation + tile.block_n * weight)
