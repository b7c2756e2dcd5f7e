"""Compile ahead what the server will launch, into the Triton cache that it reads.

Triton compiles a kernel anew for each specialisation of its arguments: whether the token counts are divisible by 16 or
equal to 1. A request that is the first of its kind waits for that (seconds, eight times the usual time to the first
token), unless it was compiled before.
"""

from __future__ import annotations

from collections.abc import Mapping

from fixer.families.fused_moe.arguments import Product, padded_tokens
from fixer.kernel.compile import Candidate
from fixer.workload import BOTH, Projection, RowTiles, Tile, Workload


def server_candidates(workload: Workload, rows: Mapping[int, RowTiles], most_tokens: int) -> list[Candidate]:
    """Every (kernel, specialisation) that a server can launch with these rows, for M from 1 to `most_tokens`."""
    wanted: dict[tuple[object, ...], Candidate] = {}
    for tokens in range(1, most_tokens + 1):
        pair = rows[min(rows, key=lambda key: abs(key - tokens))]
        for projection in BOTH:
            tile = pair.gate_up if projection is Projection.GATE_UP else pair.down
            is_sorted = projection is Projection.GATE_UP and pair.down.use_tma
            key = (projection, tile, is_sorted, *_specialisation(workload, projection, tile, tokens))
            wanted.setdefault(key, Candidate(workload, projection, tile, tokens, is_sorted))
    return list(wanted.values())


def _specialisation(workload: Workload, projection: Projection, tile: Tile, tokens: int) -> tuple[bool, ...]:
    """What of a launch's token counts enters Triton's cache key."""
    product = Product(workload, projection, tokens)
    length = padded_tokens(workload, tokens, tile.block_m)
    # The last one is 0.5.23's GDC_EARLY; older kernels lack it and compile the same thing twice at worst, from cache.
    return (length % 16 == 0, length == 1, product.routed % 16 == 0, product.routed == 1, product.rows <= 512)
