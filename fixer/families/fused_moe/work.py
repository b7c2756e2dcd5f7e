"""What a layer has to do at the least: bytes to move and operations to compute.

What a product has to move, at the least: the weights of the experts that some token goes to, each once; the rows of A
and their scales, each once; the rows of C, written once. With E experts on each of R ranks, M tokens, and p_i the
chance that a token draws expert i among its k, the expected number of a rank's experts in use is

    sum over i of (1 - (1 - p_i) ** M) / R

averaged over the routings that moefix measures with (`fixer.families.fused_moe.routing`); for uniform routing p_i is
k / (E * R).
What it has to compute: 2 * (M * k / R) * columns * depth operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from fixer.families.fused_moe.arguments import Product, Role, operands
from fixer.families.fused_moe.routing import MIX, chances
from fixer.workload import Projection, Tile, Workload

_ANY_TILE = Tile(16, 16, 16, 1)


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
