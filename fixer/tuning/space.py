"""The configurations that can be tried: the whole space, what a workload allows of it, a tile's neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from fixer.kernel import always_spills
from fixer.workload import Projection, Tile, Workload

AXES: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "group_m": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
"""SGLang's own tuning space (its tuning script's `get_configs_compute_bound`), 1920 configurations."""


@dataclass(frozen=True)
class Space:
    """What a workload allows of the space.

    Attributes:
        workload: block-wise scales bind BLOCK_SIZE_K: a step along K must stay within one block's scale.
    """

    workload: Workload

    def allows(self, tile: Tile) -> bool:
        """Whether a tile computes the right result and can be fast (a spilling accumulator never is)."""
        if always_spills(tile) or tile.use_tma:
            return False
        block_shape = self.workload.block_shape
        return block_shape is None or block_shape[1] % tile.block_k == 0

    def all(self) -> Iterator[Tile]:
        """Every allowed configuration, in a stable order."""
        for values in product(*AXES.values()):
            tile = Tile(*values)
            if self.allows(tile):
                yield tile

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """The allowed configurations one step along one axis away."""
        for axis, values in AXES.items():
            value = getattr(tile, axis)
            for step in _steps(value, values):
                neighbour = replace(tile, **{axis: step}, use_tma=False)
                if self.allows(neighbour):
                    yield neighbour


def _steps(value: int, values: tuple[int, ...]) -> Iterable[int]:
    """The next smaller and the next larger value of an axis (a shipped file's value may lie between)."""
    smaller = [other for other in values if other < value]
    larger = [other for other in values if other > value]
    return [*smaller[-1:], *larger[:1]]


def makes_sense(tile: Tile, workload: Workload, tokens: int) -> bool:
    """Whether a block of BLOCK_SIZE_M rows can be a good fit for M = `tokens`.

    An expert gets t = M * top_k / E tokens on average. A block many times taller than that computes padding, one many
    times lower loads the expert's weights over and over. In the H100 landscape the best block height is never more
    than 16 t (32 where t is below 2) and never less than t / 4.
    """
    mean = tokens * workload.top_k / workload.experts
    return mean / 4 <= tile.block_m <= max(32.0, 16 * mean) or tile.block_m == AXES["block_m"][-1] < mean / 4


def impossible_after(refused: Tile, tile: Tile) -> bool:
    """Whether a tile needs at least the shared memory of one that was compiled and did not fit.

    Shared memory grows with each block size and with the number of stages, all else equal; so what did not fit says
    something of its larger relatives, and no formula is needed.
    """
    return (
        tile.num_warps == refused.num_warps
        and tile.group_m == refused.group_m
        and tile.block_m >= refused.block_m
        and tile.block_n >= refused.block_n
        and tile.block_k >= refused.block_k
        and tile.num_stages >= refused.num_stages
    )


BOTH = (Projection.GATE_UP, Projection.DOWN)
"""The projections in the order in which a layer runs them."""
