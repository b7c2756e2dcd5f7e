"""How much of a card's memory measuring takes, and how it makes do with less. Pure: bytes in, shapes out.

Weights must be cold as a server's are: consecutive launches read several times the L2 cache before they come back to
the same bytes. A small layer has several copies for that. On a card that is nearly full a large layer has weights for
some of its experts only, and the others read those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fixer.families.fused_moe.arguments import Operand, Product, Role, operands
from fixer.workload import BOTH, Projection, Tile, Workload

COLD_FACTOR = 4
"""Consecutive launches read this many times the L2 cache before they come back to the same weights."""

MOST_COPIES = 16

SPARE_SHARE, SPARE_BYTES = 0.1, 512 << 20
"""What stays free on the card besides: for CUDA's graphs, kernels and scratch. A card filled to the brim pages."""

OUTPUTS = 16
"""Results of the layer that a comparison holds at a time: two sides, alone and in a graph, four routings."""

ANY_TILE = Tile(16, 32, 64, 1)
"""Shapes of weights and activations do not depend on the tile."""

PER_EXPERT = (Role.B, Role.B_SCALE, Role.B_ZERO_POINT)
"""Operands whose first dimension is the experts."""


@dataclass(frozen=True)
class Rotation:
    """How a projection's weights are laid out.

    Attributes:
        copies: of all weights; consecutive launches take turns.
        experts: those that have weights of their own; expert e reads those of e modulo this.
    """

    copies: int
    experts: int


def layer_operands(product: Product, experts: int) -> dict[Role, Operand]:
    """A projection's operands with room for `product.tokens` tokens and weights for that many experts."""
    shapes = operands(product, ANY_TILE, sorted_length=16)
    return {
        role: replace(operand, shape=(experts, *operand.shape[1:])) if role in PER_EXPERT else operand
        for role, operand in shapes.items()
    }


def needed_bytes(product: Product, rotation: Rotation) -> int:
    """Device memory of a projection's layer in bytes."""
    shapes = layer_operands(product, rotation.experts)
    return sum(operand.bytes * (rotation.copies if role is Role.B else 1) for role, operand in shapes.items())


def with_spare(needed: int) -> int:
    """The free memory in bytes that a card should have for `needed` bytes of tensors."""
    return int(needed * (1 + SPARE_SHARE)) + SPARE_BYTES


def copies_for_cold(weight_bytes: int, l2_bytes: int) -> int:
    """Copies of some weights that together are several times the L2 cache; at most 16."""
    return max(1, min(MOST_COPIES, -(-COLD_FACTOR * l2_bytes // weight_bytes)))


def full_rotation(product: Product, l2_bytes: int) -> Rotation:
    """All experts' weights, in as many copies as it takes to be cold."""
    weights = layer_operands(product, product.workload.experts)[Role.B].bytes
    return Rotation(copies_for_cold(weights, l2_bytes), product.workload.experts)


def smallest_rotation(product: Product, l2_bytes: int) -> Rotation:
    """The fewest experts that are still cold: several times the L2 cache in one copy, else all that there are."""
    full = full_rotation(product, l2_bytes)
    one = layer_operands(product, 1)[Role.B].bytes
    return full if full.copies > 1 else Rotation(1, min(full.experts, max(1, -(-COLD_FACTOR * l2_bytes // one))))


def rotations(
    products: Mapping[Projection, Product], l2_bytes: int, free_bytes: int
) -> dict[Projection, Rotation] | None:
    """The largest layout of some projections' weights that leaves the card its spare memory; None where none does.

    Args:
        products: with the largest M that will be timed.
        l2_bytes: the card's L2 cache.
        free_bytes: what is free on the card.
    """

    def fits(chosen: Mapping[Projection, Rotation]) -> bool:
        return with_spare(sum(needed_bytes(products[p], chosen[p]) for p in products)) <= free_bytes

    full = {p: full_rotation(product, l2_bytes) for p, product in products.items()}
    least = {p: smallest_rotation(product, l2_bytes) for p, product in products.items()}
    if fits(full):
        return full
    for share in range(15, -1, -1):  # sixteenths of the way from the least to all
        chosen = {p: _between(least[p], full[p], share / 16) for p in products}
        if fits(chosen):
            return chosen
    return None


def _between(least: Rotation, full: Rotation, share: float) -> Rotation:
    return replace(least, experts=least.experts + int((full.experts - least.experts) * share))


def layer_room(workload: Workload, tokens: int, l2_bytes: int) -> tuple[int, int]:
    """What SGLang's own layer takes for up to M = `tokens`: copies of its weights, and bytes with spare memory.

    It keeps all three intermediate results of a pass (fused_moe.py: cache1, cache2, cache3) besides the activations,
    and what both sides made of each routing of the mix, once by itself and once in a graph.
    """
    one = {p: Product(workload, p, 1) for p in BOTH}
    weights = sum(layer_operands(product, workload.experts)[Role.B].bytes for product in one.values())
    copies = copies_for_cold(weights, l2_bytes)
    needed = sum(needed_bytes(product, Rotation(copies, workload.experts)) for product in one.values())
    up, down = (Product(workload, p, tokens) for p in BOTH)
    element = Operand(workload.activation_dtype, (1,)).bytes
    passing = up.routed * (up.columns + down.depth + down.columns)
    passing += (2 + OUTPUTS) * tokens * workload.hidden_size
    return copies, with_spare(needed + passing * element)


LARGEST_L2 = 128 << 20
"""Bytes: no card has a larger L2 cache (B200: 126 MiB); which this one has is known to the measuring process only."""


SMALLEST_L2 = 1 << 20
"""Bytes: no card that Triton compiles for has less (Jetson)."""


CONTEXTS = 1 << 30
"""Bytes that two processes' CUDA contexts and libraries take on a card, about."""
