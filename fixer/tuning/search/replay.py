"""A recorded landscape in place of a card: the same search, judged against every configuration there is.

The format is that of shared/landscapes/README.md: a gzipped CSV with a line for each projection, M and configuration.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TextIO

from fixer.base.errors import UsageError
from fixer.families.family import Family
from fixer.families.registry import UNNAMED
from fixer.tuning.search.runner import Look, More, Request
from fixer.tuning.search.search import Pair, Search
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, Tile

TILE_COLUMNS = tuple(axis.key for axis in UNNAMED.axes)
REQUIRED_COLUMNS = ("phase", "M", *TILE_COLUMNS, "us")
"""The fused MoE kernel's; another family has its own axes."""

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
        family: whose kernels they are.
    """

    kernels: Mapping[Kernel, Recorded]
    limit: int | None = None
    family: Family = UNNAMED

    @classmethod
    def read(
        cls,
        path: Path,
        limit: int | None = None,
        limit_column: str = "shared_bytes",
        family: Family = UNNAMED,
    ) -> Recording:
        """Read a recording.

        Args:
            path: a CSV file, gzipped or not.
            limit: only kernels of at most so many bytes may be chosen.
            limit_column: the column that the limit applies to.
            family: whose kernels were recorded.

        Raises:
            UsageError: the file cannot be read, lacks a column, or a line makes no sense (its number is named).
        """
        try:
            with _open(path) as lines:
                kernels = _read_kernels(path, lines, limit_column if limit is not None else None, family)
                return cls(kernels, limit, family)
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
        return tuple(projection for projection in self.family.products if projection in present)

    @cached_property
    def axes(self) -> Mapping[str, frozenset[int]]:
        """The values of each of the tile's fields that were recorded."""
        tiles = [kernel.tile for kernel in self.kernels]
        return {name: frozenset(getattr(tile, name) for tile in tiles) for name in self.family.axis}

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


def _open(path: Path) -> TextIO:
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


@dataclass
class _Lines:
    """The lines of one kernel, as they are gathered."""

    timings: dict[int, Timing] = field(default_factory=dict)
    compile_seconds: float = 0.0
    limited_bytes: int = 0


def _read_kernels(path: Path, lines: Iterable[str], limit_column: str | None, family: Family) -> dict[Kernel, Recorded]:
    reader = csv.DictReader(lines, strict=True)
    columns = reader.fieldnames or []
    needed = ["phase", "M", *(axis.key for axis in family.axes), "us", *([limit_column] if limit_column else [])]
    missing = [column for column in needed if column not in columns]
    if missing:
        raise UsageError(f"{path} lacks the column {', '.join(missing)}.", _HINT)
    gathered: dict[Kernel, _Lines] = {}
    for line in reader:
        try:
            _gather(gathered, line, limit_column, family)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}, line {reader.line_num}: {error}", _HINT) from error
    if not gathered:
        raise UsageError(f"{path} has no lines.", _HINT)
    return {
        kernel: Recorded(kernel, of.timings, of.compile_seconds, of.limited_bytes) for kernel, of in gathered.items()
    }


def _gather(gathered: dict[Kernel, _Lines], line: Mapping[str, str], limit_column: str | None, family: Family) -> None:
    """Add one line.

    Raises:
        ValueError, TypeError: a value is missing or makes no sense.
    """
    phases = dict(zip(family.phases, family.products, strict=True))
    if line["phase"] not in phases:
        raise ValueError(f"phase is {line['phase']!r}, none of {', '.join(phases)}")
    tile = family.tile_of({axis.key: _whole(line, axis.key) for axis in family.axes})
    kernel = Kernel(phases[line["phase"]], replace(tile, use_tma=line.get("USE_TMA") == "1"))
    tokens, microseconds = _whole(line, "M"), _time(line, "us")
    of = gathered.setdefault(kernel, _Lines())
    if tokens in of.timings:
        raise ValueError(f"{kernel.projection.value} {kernel.tile} at M = {tokens} is there twice")
    least = _time(line, "us_min") if line.get("us_min") else microseconds
    of.timings[tokens] = Timing(kernel, tokens, microseconds, least, 1 if line.get("rough") == "1" else REPLAYS)
    of.compile_seconds = float(line["compile_s"]) if line.get("compile_s") else of.compile_seconds
    of.limited_bytes = _whole(line, limit_column, least=0) if limit_column else 0


def _whole(line: Mapping[str, str], column: str, least: int = 1) -> int:
    text = line[column]
    if text is None or not text.isascii() or not text.isdecimal() or int(text) < least:
        raise ValueError(f"{column} is {text!r}, not a whole number of at least {least}")
    return int(text)


def _time(line: Mapping[str, str], column: str) -> float:
    value = float(line[column])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{column} is {line[column]!r}, not a time in microseconds")
    return value


class ReplayRunner:
    """A runner that answers from a recording; it counts what a card would have had to do.

    A kernel that the recording lacks or that is above the limit counts as one that does not fit. One whose values are
    not on the recording's grid (a shipped file's GROUP_SIZE_M of 8, say) says nothing about its larger relatives, so
    it counts as one that does not compile.

    Attributes:
        trials: (kernel, row) looked at.
        compile_seconds: one core's seconds for the kernels looked at, as far as the recording knows.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.trials = 0
        self.compile_seconds = 0.0

    def look(self, requests: Sequence[Request], more: More | None = None) -> Iterator[Look]:
        """Answer in the order of the requests, a whole round before the next."""
        del more
        for request in requests:
            yield self._look(request)

    def _look(self, request: Request) -> Look:
        recorded = self.recording.kernels.get(request.kernel)
        if recorded is None:
            on_grid = self.recording.covers(request.kernel.tile)
            outcome = Outcome.TOO_MUCH_SHARED_MEMORY if on_grid else Outcome.COMPILE_ERROR
            return Look(Build(request.kernel, outcome, message="not in the recording"))
        self.compile_seconds += recorded.compile_seconds
        build = Build(request.kernel, Outcome.OK, recorded.limited_bytes, compile_seconds=recorded.compile_seconds)
        if not self.recording.fits(recorded):
            return Look(replace(build, outcome=Outcome.TOO_MUCH_SHARED_MEMORY))
        timings = tuple(recorded.timings[tokens] for tokens in request.rows if tokens in recorded.timings)
        self.trials += len(timings)
        return Look(build, timings)

    def closer(self, wanted: Iterable[tuple[Kernel, int]], replays: int) -> Iterator[Timing]:
        """Nothing: a recording holds one time for each kernel and row, and it has been told."""
        del wanted, replays
        return iter(())


@dataclass(frozen=True)
class Regret:
    """How far a finished search is from the best that a recording holds, by M: 1 is the best itself."""

    rows: Mapping[int, float]

    @classmethod
    def of(cls, search: Search, recording: Recording) -> Regret:
        """The regret of every row that has a pair within the limit at all; infinite where the search found none."""
        rows = {}
        for tokens in recording.rows:
            best, pairs = recording.best(tokens), search.best_pairs(tokens)
            if math.isfinite(best):
                rows[tokens] = recording.time(pairs[0], tokens) / best if pairs else math.inf
        return cls(rows)

    @property
    def geomean(self) -> float:
        """The geometric mean over the rows."""
        return math.exp(sum(map(math.log, self.rows.values())) / len(self.rows))

    @property
    def worst(self) -> float:
        """The worst row's."""
        return max(self.rows.values())
