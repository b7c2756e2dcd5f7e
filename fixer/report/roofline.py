"""How near a measured time comes to what the card could do at best: its memory bandwidth and its matrix units.

What a product has to move, at the least: the weights of the experts that some token goes to, each once; the rows of A
and their scales, each once; the rows of C, written once. With E experts on each of R ranks, M tokens, and p_i the
chance that a token draws expert i among its k, the expected number of a rank's experts in use is

    sum over i of (1 - (1 - p_i) ** M) / R

averaged over the routings that moefix measures with (`fixer.tuning.measure.routing`); for uniform routing p_i is
k / (E * R).
What it has to compute: 2 * (M * k / R) * columns * depth operations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from fixer.kernel.arguments import Product, Role, operands
from fixer.tuning.measure.routing import MIX, chances
from fixer.workload import NumberFormat, Projection, Tile, Workload

_ANY_TILE = Tile(16, 16, 16, 1)


@dataclass(frozen=True)
class Peak:
    """A card's limits, as NVIDIA publishes them; None where it does not, or not for this number format.

    Attributes:
        bandwidth: of the card's memory, in bytes a second.
        half: dense matrix operations a second in bfloat16 (float16 on cards without it), accumulated in float32.
        fp8: the same in FP8.
        source: where the numbers are from.
    """

    bandwidth: float
    half: float | None
    fp8: float | None
    source: str

    def compute(self, number_format: NumberFormat) -> float | None:
        """Operations a second in the type that the products run in; None where that is not known."""
        match number_format:
            case NumberFormat.NONE | NumberFormat.INT4_W4A16 | NumberFormat.INT8_W8A16:
                return self.half
            case NumberFormat.FP8_W8A8:
                return self.fp8
        return None


@lru_cache(maxsize=1)
def _peaks() -> dict[str, Peak]:
    rows = json.loads(resources.files("fixer").joinpath("data/peaks.json").read_text("utf-8"))
    return {
        row["name"]: Peak(
            row["bandwidth_gbs"] * 1e9,
            row["half_tflops"] * 1e12 if "half_tflops" in row else None,
            row["fp8_tflops"] * 1e12 if "fp8_tflops" in row else None,
            row["source"],
        )
        for row in rows
    }


def peak_of(card: str) -> Peak | None:
    """The limits of a card by its driver's name (data/peaks.json), None for one whose limits are not known."""
    return _peaks().get(card)


@dataclass(frozen=True)
class Work:
    """The least that a product has to move, in bytes, and to compute, in operations."""

    moved: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.moved + other.moved, self.operations + other.operations)


def experts_in_use(workload: Workload, tokens: int) -> float:
    """Expected number of the shard's experts that at least one of M = `tokens` tokens goes to (see above)."""
    everywhere = workload.experts * workload.ep_size
    routings = [chances(routing, everywhere, min(workload.top_k, everywhere)) for routing in MIX]
    used = [sum(1 - (1 - chance) ** tokens for chance in routing) for routing in routings]
    return sum(used) / len(used) / workload.ep_size


def work_of(workload: Workload, projection: Projection, tokens: int) -> Work:
    """What one projection has to do for M = `tokens` (see above)."""
    product = Product(workload, projection, tokens)
    tensors = operands(product, _ANY_TILE, 0)
    of_experts = sum(tensors[role].bytes for role in (Role.B, Role.B_SCALE, Role.B_ZERO_POINT) if role in tensors)
    of_rows = sum(tensors[role].bytes for role in (Role.A, Role.A_SCALE) if role in tensors)
    here = 1 / workload.ep_size  # of the tokens' choices, on average
    # A token is read where one of its experts is on this rank.
    rows_in_use = 1 - (1 - here) ** workload.top_k if product.is_up else here
    moved = of_experts * experts_in_use(workload, tokens) / workload.experts
    moved += of_rows * rows_in_use + tensors[Role.C].bytes * here
    return Work(moved, 2 * product.routed * here * product.columns * product.depth)


def layer_work(workload: Workload, tokens: int) -> Work:
    """What both products together have to do."""
    return work_of(workload, Projection.GATE_UP, tokens) + work_of(workload, Projection.DOWN, tokens)


@dataclass(frozen=True)
class Share:
    """Which fraction of the card's limits a time reaches; `compute` is None where that limit is not known."""

    memory: float
    compute: float | None


def share_of(work: Work, microseconds: float, peak: Peak, number_format: NumberFormat) -> Share:
    """The shares that so much work in so many microseconds comes to."""
    seconds = microseconds / 1e6
    most = peak.compute(number_format)
    return Share(work.moved / seconds / peak.bandwidth, work.operations / seconds / most if most else None)
