"""Where a search begins: what won elsewhere.

SGLang ships some 330 tuning files for NVIDIA cards. The configurations that occur most often in those of the same
number format come within 1 % of the exhaustive best of a card and shape that none of them knows (facts.md), so they
are worth more than any clever search.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fixer.kernel.space import Space
from fixer.machine.cards import Card
from fixer.sglang.tree import TuningFile
from fixer.workload import NumberFormat, Tile, Workload

RELATED: dict[NumberFormat, tuple[NumberFormat, ...]] = {
    NumberFormat.FP8_W8A8: (NumberFormat.INT8_W8A8,),
    NumberFormat.INT8_W8A8: (NumberFormat.FP8_W8A8,),
    NumberFormat.INT4_W4A16: (NumberFormat.INT8_W8A16, NumberFormat.NONE),
    NumberFormat.INT8_W8A16: (NumberFormat.INT4_W4A16, NumberFormat.NONE),
    NumberFormat.NONE: (),
    NumberFormat.FLOAT32: (NumberFormat.NONE,),
}
"""Formats whose winners help where a format has few files of its own: the same bytes an element, nearest first."""

FOREIGN_WEIGHT = 0.02
"""A related format's win counts this much: it only fills up a list that would be short."""

_ANCHORS = (
    (128, 128, 1, 4, 3),
    (256, 128, 1, 8, 3),
    (64, 128, 1, 4, 4),
    (128, 64, 16, 4, 4),
    (64, 64, 1, 4, 3),
)
_WEIGHT_ONLY_ANCHORS = (
    (64, 64, 1, 4, 3),
    (32, 64, 1, 4, 4),
    (64, 128, 1, 4, 2),
    (128, 64, 1, 8, 3),
    (32, 128, 1, 4, 3),
)
"""(BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_SIZE_M, warps, stages), spread over the middle of the space. Weight-only kernels
unpack their weights in registers, so that wide blocks spill there."""

_WEIGHT_ONLY = (NumberFormat.INT4_W4A16, NumberFormat.INT8_W8A16)


def anchors(workload: Workload, block_m: int) -> list[Tile]:
    """Plain configurations of one BLOCK_SIZE_M, for heights that the shipped files leave out.

    Half of all wins have a BLOCK_SIZE_M of 16, since most rows of the files are small; a search that saw no tall
    block that fits lost 10 % at M = 4096 in replays with limited shared memory or another format's seeds.
    """
    space = Space(workload)
    shapes = _WEIGHT_ONLY_ANCHORS if workload.number_format in _WEIGHT_ONLY else _ANCHORS
    tiles = (Tile(block_m, *shape) for shape in shapes)
    return [tile for tile in tiles if space.allows(tile)]


def seeds(files: Iterable[TuningFile], workload: Workload, card: Card, extra: Sequence[Tile] = ()) -> tuple[Tile, ...]:
    """Configurations in the order in which they are worth trying, each once.

    Args:
        files: the tuning files that SGLang ships.
        extra: configurations that come first (earlier artefacts of this machine, SGLang's own choice).
    """
    space = Space(workload)
    wins: dict[Tile, float] = defaultdict(float)
    for file in files:
        weight = weight_of(file, workload, card)
        if weight == 0:
            continue
        for tile in file.rows.values():
            plain = Tile(tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages)
            if space.allows(plain):
                wins[plain] += weight
    ranked = sorted(wins, key=lambda tile: (-wins[tile], tile))
    return tuple(dict.fromkeys([*(tile for tile in extra if space.allows(tile)), *ranked]))


def weight_of(file: TuningFile, workload: Workload, card: Card) -> float:
    """What one win of a shipped file counts: same number format, nearest card and shape; 0 for one of no use."""
    return _format_weight(file, workload) * _card_weight(file, card) * _shape_weight(file, workload)


def _format_weight(file: TuningFile, workload: Workload) -> float:
    same_blocks = (file.block_shape is None) == (workload.block_shape is None)
    if file.number_format is workload.number_format and same_blocks:
        return 1.0
    if file.number_format in (workload.number_format, *RELATED[workload.number_format]):
        return FOREIGN_WEIGHT
    return 0.0


def _card_weight(file: TuningFile, card: Card) -> float:
    """The same card's files count most; a relative's (same generation by its name) a little more than others'."""
    if file.device == card.sglang_name:
        return 3.0
    return 1.5 if _generation(file.device) == _generation(card.sglang_name) else 1.0


_GENERATIONS = (
    ("blackwell", ("B200", "B300", "GB200", "GB300")),
    ("blackwell consumer", ("RTX_50", "PRO_6000", "RTX_PRO", "GB10")),
    ("hopper", ("H100", "H200", "H20", "H800", "GH200")),
    ("ada", ("RTX_40", "Ada", "L40", "L4", "L20")),
    ("ampere", ("A100", "A800", "RTX_30", "A10", "A40", "RTX_A")),
)


def _generation(device: str) -> str:
    for generation, marks in _GENERATIONS:
        if any(mark in device for mark in marks):
            return generation
    return device


def _shape_weight(file: TuningFile, workload: Workload) -> float:
    """Nearer shapes first: half the weight for every factor of about four in experts or width."""
    distance = abs(math.log2(file.experts / workload.experts)) + abs(
        math.log2(file.intermediate / workload.intermediate)
    )
    return 1.0 / (1.0 + distance / 2)
