"""Where a search begins: what won elsewhere.

SGLang ships some 330 tuning files for NVIDIA cards. The configurations that occur most often in those of the same
number format come within 1 % of the exhaustive best of a card and shape that none of them knows (facts.md), so they
are worth more than any clever search.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fixer.families.registry import family_of
from fixer.kernel.space import Space
from fixer.machine.cards import Card
from fixer.sglang.tree import TuningFile
from fixer.workload import AnyWorkload, Tile


def anchors(workload: AnyWorkload, block_m: int) -> list[Tile]:
    """Plain configurations of one BLOCK_SIZE_M, for heights that the shipped files leave out.

    Half of all wins have a BLOCK_SIZE_M of 16, since most rows of the files are small; a search that saw no tall
    block that fits lost 10 % at M = 4096 in replays with limited shared memory or another format's seeds.
    """
    space = Space(workload)
    return [tile for tile in family_of(workload).anchors(workload, block_m) if space.allows(tile)]


def seeds(
    files: Iterable[TuningFile], workload: AnyWorkload, card: Card, extra: Sequence[Tile] = ()
) -> tuple[Tile, ...]:
    """Configurations in the order in which they are worth trying, each once.

    Args:
        files: the tuning files that SGLang ships.
        extra: configurations that come first (earlier artefacts of this machine, SGLang's own choice).
    """
    space, family = Space(workload), family_of(workload)
    wins: dict[Tile, float] = defaultdict(float)
    for file in files:
        weight = family.seed_weight(file, workload, card)
        if weight == 0:
            continue
        for tile in file.rows.values():
            plain = replace(tile, use_tma=False)
            if space.allows(plain):
                wins[plain] += weight
    ranked = sorted(wins, key=lambda tile: (-wins[tile], tile))
    return tuple(dict.fromkeys([*(tile for tile in extra if space.allows(tile)), *ranked]))
