"""What experts and a routing allow of the space, and what makes sense for a number of tokens."""

from __future__ import annotations

from fixer.workload import NumberFormat, Projection, Tile, Workload

DESCRIPTOR_TOKENS = 256
"""Tensor descriptors are tried from this M on. Gains are reported at prefill sizes (10 to 28 %), and NaN at M = 1 and 2
(on another card)."""


def descriptor_projections(
    workload: Workload, capability: tuple[int, int], taken: frozenset[Projection]
) -> frozenset[Projection]:
    """The projections that are worth trying with tensor descriptors.

    Args:
        capability: the card's; descriptors are hardware from 9.0 on.
        taken: what the release takes them for (`Tree.takes_descriptors`).

    The down product then reads its rows in sorted order, scales included. Of one scale a row or a tensor SGLang makes
    something else there (a row's is read in token order, a tensor's is taken over the padding too), and rows of experts
    on other ranks are zeroed in token order: such layers come out wrong, so they are not tried (0.5.17 and 0.5.18,
    fused_moe_triton_kernels.py: `a_desc`, `write_zeros_to_output`).
    """
    if capability < (9, 0) or workload.group_size or workload.number_format is NumberFormat.FLOAT32:
        return frozenset()
    sorts = workload.ep_size == 1 and (workload.number_format is NumberFormat.NONE or workload.block_shape is not None)
    return frozenset(p for p in taken if p is Projection.GATE_UP or sorts)


TALL = 64
"""Blocks of at least so many rows are never too low: with hundreds of tokens an expert the weights stay in L2 anyway,
and a block's height is bounded by registers and shared memory (Mixtral at M = 4096 has 1024 tokens an expert)."""


def tokens_per_expert(workload: Workload, tokens: int) -> float:
    """The mean number of tokens of an expert under uniform routing: M * top_k over the experts of all ranks."""
    return tokens * workload.top_k / (workload.experts * workload.ep_size)


def makes_sense(tile: Tile, workload: Workload, tokens: int) -> bool:
    """Whether a block of BLOCK_SIZE_M rows can be a good fit for M = `tokens`.

    An expert gets t tokens on average (`tokens_per_expert`). A block many times taller computes padding, one many times
    lower loads the expert's weights over and over. In the H100 landscape the best block height is never more
    than 16 t (32 where t is below 2) and never less than t / 4; the margins leave room for skewed routing.
    """
    if tile.use_tma and tokens < DESCRIPTOR_TOKENS:
        return False
    mean = tokens_per_expert(workload, tokens)
    return min(mean / 4, TALL) <= tile.block_m <= max(32.0, 16 * mean)
