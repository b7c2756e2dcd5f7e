"""Which configurations to propose for a ladder of batch sizes, with as few compilations as need be.

What won in SGLang's shipped files near a row's M is what the row should get, if it fits. Rows share tiles wherever
that costs little, since each distinct tile has to be compiled for both projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fixer.families.registry import family_of
from fixer.kernel.space import Space, least_bytes
from fixer.machine.cards import Card
from fixer.sglang.tree import TuningFile
from fixer.sglang.tuning_files import nearest_row
from fixer.workload import AnyWorkload, Tile

GOOD_RANK = 3
"""A row takes any of its first three: among those it is the one that most other rows can take as well."""

NEAR = 2.0
"""Rows of a shipped file within this factor of M count.

On the H100 landscape limited to 101376 bytes, proposals with these numbers are 3.3 % slower than the exhaustive best
at the geometric mean and 7 % at worst; SGLang's own default 9.7 % and 40 %."""

MOST_WAVES = 4
"""Waves of compiling, each for the rows that the one before left without a fitting tile."""


@dataclass(frozen=True)
class Offers:
    """For each row M the configurations worth proposing, the best first; not yet known to fit."""

    rows: Mapping[int, tuple[Tile, ...]]

    def without(self, done: Iterable[int], refused: frozenset[Tile]) -> Offers:
        """What is left for the rows that are not done, without the refused tiles."""
        gone = set(done)
        return Offers(
            {
                tokens: tuple(tile for tile in tiles if tile not in refused)
                for tokens, tiles in self.rows.items()
                if tokens not in gone
            }
        )

    def cover(self) -> tuple[Tile, ...]:
        """Few tiles that give every row one of its first `GOOD_RANK`: greedily the one that serves most."""
        worth = {
            tokens: {tile: 1.0 / (rank + 1) for rank, tile in enumerate(tiles[:GOOD_RANK])}
            for tokens, tiles in self.rows.items()
        }
        chosen: list[Tile] = []
        open_rows = {tokens for tokens, tiles in worth.items() if tiles}
        while open_rows:
            totals: dict[Tile, float] = {}
            for tokens in sorted(open_rows):
                for tile, value in worth[tokens].items():
                    totals[tile] = totals.get(tile, 0.0) + value
            best = max(totals, key=lambda tile: (totals[tile], tile))
            chosen.append(best)
            open_rows = {tokens for tokens in open_rows if best not in worth[tokens]}
        return tuple(chosen)


def offers(files: Sequence[TuningFile], workload: AnyWorkload, card: Card, rows: Iterable[int]) -> Offers:
    """What won near each row's M in the shipped files of the number format, nearest cards and shapes first.

    Args:
        files: the tuning files that SGLang ships.
        rows: the M to propose for.
    """
    weights = [(file, family_of(workload).seed_weight(file, workload, card)) for file in files]
    weighted = [(file, weight) for file, weight in weights if weight > 0]
    return Offers({tokens: _ranked(_wins(weighted, workload, tokens), workload, card, tokens) for tokens in rows})


def _wins(weighted: Iterable[tuple[TuningFile, float]], workload: AnyWorkload, tokens: int) -> dict[Tile, float]:
    """How much each tile won near M = `tokens`; every file gives its whole weight, spread over its near rows."""
    space = Space(workload)
    wins: dict[Tile, float] = {}
    for file, weight in weighted:
        near = _near_rows(file, workload, tokens)
        for tile in near:
            plain = replace(tile, use_tma=False)
            if space.allows(plain):
                wins[plain] = wins.get(plain, 0.0) + weight / len(near)
    return wins


def _near_rows(file: TuningFile, workload: AnyWorkload, tokens: int) -> list[Tile]:
    """The tiles of the rows within a factor of `NEAR` of the M that is the same work (`Family.same_tokens`)."""
    same = family_of(workload).same_tokens(file, workload, tokens)
    near = [tile for key, tile in file.rows.items() if same / NEAR <= key <= same * NEAR]
    return near or [nearest_row(file.rows, round(same))]


def _ranked(wins: Mapping[Tile, float], workload: AnyWorkload, card: Card, tokens: int) -> tuple[Tile, ...]:
    """The tiles whose block height suits M, the one with most wins in its neighbourhood first; misfits come last.

    Few files have a row near any M, so that the one tile that won most often is a matter of chance (and at worst
    takes three times as long as the best); the middle of the region where the winners are is not.
    """
    places = {tile: _place(tile) for tile in wins}
    likely = {}
    for tile in wins:
        if family_of(workload).makes_sense(tile, workload, tokens):
            support = sum(weight * 0.5 ** math.dist(places[tile], places[other]) for other, weight in wins.items())
            likely[tile] = (least_bytes(tile, workload) > card.shared_memory, -support, tile)
    return tuple(sorted(likely, key=lambda tile: likely[tile]))


def _place(tile: Tile) -> tuple[float, ...]:
    """A tile as a point: half as much support for every step along an axis that matters, less for the others."""
    return (
        math.log2(tile.block_m),
        math.log2(tile.block_n),
        math.log2(tile.block_k),
        math.log2(tile.num_warps),
        tile.num_stages / 2,
        0.5 * (tile.group_m > 1),
    )


def choose(
    wanted: Offers, compile_all: Callable[[Iterable[Tile]], None], fits: Callable[[Tile], bool]
) -> dict[int, Tile]:
    """A fitting tile for each row, the best offer first; rows for which none was found are left out.

    Args:
        wanted: what may be proposed.
        compile_all: compiles tiles for both projections; asked for a few at a time.
        fits: whether a compiled tile fits for both projections.
    """
    chosen: dict[int, Tile] = {}
    left = wanted
    tried: set[Tile] = set()
    for _ in range(MOST_WAVES):
        wave = left.cover()
        if not wave:
            break
        compile_all(wave)
        tried.update(wave)
        for tokens, tiles in left.rows.items():
            found = next((tile for tile in tiles if tile in tried and fits(tile)), None)
            if found is not None:
                chosen[tokens] = found
        left = left.without(chosen, frozenset(tile for tile in tried if not fits(tile)))
    return chosen
