"""A recorded landscape in place of a card: the same search, judged against every configuration there is.

The format is that of shared/landscapes/README.md: a gzipped CSV with a line for each projection, M and configuration.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fixer.errors import UsageError
from fixer.workload import Projection, Tile

from .runner import Look, Request
from .search import Pair
from .space import BOTH
from .trials import Build, Kernel, Outcome, Timing

TILE_COLUMNS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
REQUIRED_COLUMNS = ("phase", "M", *TILE_COLUMNS, "us")
PHASES: Mapping[str, Projection] = {"up": Projection.GATE_UP, "down": Projection.DOWN}

REPLAYS = 3
"""A recorded time is the median of so many replays, or of one where the column `rough` says 1."""


@dataclass(frozen=True)
class Recorded:
    """What a recording says of one kernel.

    Attributes:
        timings: by M.
        compile_seconds: one core's; 0 where the recording does not say.
        limited_bytes: the column that a limit applies to, in bytes; 0 where there is no limit.
    """

    kernel: Kernel
    timings: Mapping[int, Timing]
    compile_seconds: float
    limited_bytes: int


@dataclass(frozen=True)
class Recording:
    """Every kernel of a recorded landscape.

    Attributes:
        kernels: what was recorded, whether or not it is within the limit.
        limit: bytes of shared memory that a kernel may need, None for no limit.
    """

    kernels: Mapping[Kernel, Recorded]
    limit: int | None = None

    @classmethod
    def read(cls, path: Path, limit: int | None = None, limit_column: str = "shared_bytes") -> Recording:
        """Read a recording.

        Args:
            path: a CSV file, gzipped or not.
            limit: only kernels of at most so many bytes may be chosen.
            limit_column: the column that the limit applies to.

        Raises:
            UsageError: the file cannot be read, lacks a column, or a line makes no sense (its number is named).
        """
        try:
            with _open(path) as lines:
                return cls(_read_kernels(path, lines, limit_column if limit is not None else None), limit)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
            raise UsageError(f"{path} cannot be read as a recording: {error}", _HINT) from error

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Every M, ascending."""
        return tuple(sorted({tokens for recorded in self.kernels.values() for tokens in recorded.timings}))

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The projections that were recorded, in the order in which a layer runs them."""
        present = {kernel.projection for kernel in self.kernels}
        return tuple(projection for projection in BOTH if projection in present)

    @cached_property
    def axes(self) -> Mapping[str, frozenset[int]]:
        """The values of each of the tile's fields that were recorded."""
        tiles = [kernel.tile for kernel in self.kernels]
        return {name: frozenset(getattr(tile, name) for tile in tiles) for name in _TILE_FIELDS}

    def covers(self, tile: Tile) -> bool:
        """Whether every value of a tile is one that was recorded: whether the recorded space has it in its grid."""
        return not tile.use_tma and all(getattr(tile, name) in values for name, values in self.axes.items())

    def fits(self, recorded: Recorded) -> bool:
        """Whether a kernel is within the limit."""
        return self.limit is None or recorded.limited_bytes <= self.limit

    def best(self, tokens: int) -> float:
        """The least time of a pair that shares BLOCK_SIZE_M, within the limit, in microseconds; infinite if none."""
        least: dict[int, dict[Projection, float]] = {}
        for kernel, recorded in self.kernels.items():
            if tokens in recorded.timings and self.fits(recorded):
                of_height = least.setdefault(kernel.tile.block_m, {})
                time = recorded.timings[tokens].microseconds
                of_height[kernel.projection] = min(time, of_height.get(kernel.projection, math.inf))
        sums = [sum(times.values()) for times in least.values() if len(times) == len(self.projections)]
        return min(sums, default=math.inf)

    def time(self, pair: Pair, tokens: int) -> float:
        """The recorded time of a pair, in microseconds."""
        return sum(
            self.kernels[Kernel(projection, tile)].timings[tokens].microseconds
            for projection, tile in pair.tiles.items()
        )


_HINT = "shared/landscapes/README.md describes the format."
_TILE_FIELDS = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages")


def _open(path: Path) -> Iterable[str]:
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
