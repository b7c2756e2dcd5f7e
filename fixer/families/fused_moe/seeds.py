"""Where a search of this family begins: what a win in a shipped file counts, and plain configurations."""

from __future__ import annotations

import math

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


def plain_tiles(workload: Workload, block_m: int) -> tuple[Tile, ...]:
    """Plain configurations of one BLOCK_SIZE_M, whether or not they are allowed."""
    shapes = _WEIGHT_ONLY_ANCHORS if workload.number_format in _WEIGHT_ONLY else _ANCHORS
    return tuple(Tile(block_m, *shape) for shape in shapes)


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


def same_tokens(file: TuningFile, workload: Workload, tokens: int) -> float:
    """The M that gives a file's experts as many tokens as M = `tokens` gives the workload's.

    The top-k that a file was tuned for is not in its name. Among public models it grows about as the square root of
    the number of experts (8 experts: 2, 128: 8), so tokens an expert are about M over the root of E.
    """
    return tokens * math.sqrt(file.experts / workload.experts)
