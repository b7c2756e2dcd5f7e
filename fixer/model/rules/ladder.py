"""The rows M that the server will run, and the rows to tune so that each of them has a near one.

M is the number of tokens of one forward pass on a rank (not times top-k; with DP attention the gathered tokens). SGLang
takes the row whose key is nearest to M, of two equally near the first in the file, without interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from fixer.machine.cards import Card
from fixer.sglang.flags import ServerFlags
from fixer.sglang.releases import NEW, NEWEST, OLD, at_least, rules_for
from fixer.workload import AnyWorkload

BASE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""What SGLang's own tuner measures (benchmark/kernels/fused_moe_triton/common_utils.py)."""

MAX_ROWS = 24
"""No ladder is longer."""

WORST_RATIO = 2
"""Neighbouring rows differ by this factor at most, so that no M is more than 1.5 times from its nearest row."""

LARGEST_ROW = 131072
"""No row is larger: above it the kernel's best configuration no longer changes."""

_LARGEST_GRAPH = 16384
"""Sizes of graphs are listed one by one up to here only, whatever the flags say."""

DEFAULT_PREFILL_TOKENS = 16384
"""`--max-prefill-tokens` of every release, which counts where chunked prefill is off."""

_SPECULATIVE_REQUESTS = 48
"""Running requests with speculative decoding where the user sets no limit (speculative_hook.py:258)."""


@dataclass(frozen=True)
class MemoryClass:
    """SGLang's defaults for cards with less memory than `below_mib` (None: all larger ones).

    Attributes:
        chunk: tokens of a prefill chunk.
        small_tp, large_tp: largest decode graph with tp < 4 and from 4 on.
    """

    below_mib: int | None
    chunk: int
    small_tp: int
    large_tp: int


_UP_TO_60_GIB = MemoryClass(60 * 1024, 4096, 32, 160)
_UP_TO_160_GIB = MemoryClass(160 * 1024, 8192, 256, 512)
_LARGEST = MemoryClass(None, 16384, 512, 512)

# 0.4.9: server_args.py:332-351, cuda_graph_runner.py:138-176; 0.5.17: server_args.py:4634-4694; 0.5.23:
# arg_groups/memory_hook.py:85-150.
_CLASSES: Mapping[str, tuple[MemoryClass, ...]] = {
    OLD: (
        MemoryClass(35 * 1024, 2048, 8, 80),
        MemoryClass(90 * 1024 + 1, 8192, 160, 160),
        MemoryClass(160 * 1000 + 1, 8192, 256, 256),
        MemoryClass(160 * 1024, 8192, 512, 512),
        _LARGEST,
    ),
    NEW: (
        MemoryClass(20 * 1024, 2048, 8, 8),
        MemoryClass(35 * 1024, 2048, 24, 80),
        _UP_TO_60_GIB,
        _UP_TO_160_GIB,
        _LARGEST,
    ),
    NEWEST: (
        MemoryClass(20 * 1024, 2048, 8, 8),
        MemoryClass(35 * 1024, 4096, 48, 160),
        _UP_TO_60_GIB,
        _UP_TO_160_GIB,
        _LARGEST,
    ),
}
_UNKNOWN_MEMORY = MemoryClass(None, 4096, 160, 160)


def memory_class(card: Card, release: str) -> MemoryClass:
    """SGLang's defaults for a card."""
    if card.memory_mib <= 0:
        return _UNKNOWN_MEMORY
    classes = _CLASSES[rules_for(release)]
    return next(each for each in classes if each.below_mib is None or card.memory_mib < each.below_mib)


def chunked_prefill_size(flags: ServerFlags, card: Card, release: str) -> int:
    """Tokens of a prefill chunk on one DP rank; -1 where chunking is off.

    The flag wins over the card's default; DP attention divides it by the DP size (server_args.py:6466).
    """
    chunk = flags.chunked_prefill_size or memory_class(card, release).chunk
    return max(1, chunk // _dp_ranks(flags)) if chunk > 0 else -1


def decode_graph_max_batch(flags: ServerFlags, card: Card, release: str) -> int:
    """Largest batch of the decode CUDA graphs that the server arguments come to, in requests on one DP rank."""
    if flags.cuda_graph_bs:
        return max(flags.cuda_graph_bs)
    if flags.cuda_graph_max_bs:
        return flags.cuda_graph_max_bs
    defaults = memory_class(card, release)
    return defaults.small_tp if flags.tp_size < 4 else defaults.large_tp


def decode_graph_sizes(flags: ServerFlags, card: Card, release: str) -> tuple[int, ...]:
    """Batches of the decode graphs that are captured, in requests, ascending; () with graphs off."""
    if flags.disable_cuda_graph:
        return ()
    largest = decode_graph_max_batch(flags, card, release)
    steps = _decode_steps(flags, release, min(largest, _LARGEST_GRAPH))
    sizes = set(flags.cuda_graph_bs) or {size for size in steps if size <= largest}
    sizes.add(largest)
    requests = _running_requests(flags)
    if requests is not None and largest > requests:
        sizes = {size for size in sizes if size <= requests} | {requests}
    alignment = _attention_ranks(flags) if flags.enable_dp_attention else 1
    aligned = {size for size in sizes if size * _draft_tokens(flags) % alignment == 0}
    if flags.enable_two_batch_overlap:
        aligned = {size for size in aligned if size % 2 == 0}
    return tuple(sorted(aligned or sizes))


def prefill_graph_sizes(flags: ServerFlags, card: Card, release: str) -> tuple[int, ...]:
    """Token counts of the prefill graphs, ascending; () where the release or the flags have none.

    The model may rule them out as well (latent attention, NemotronH, most multimodal models), which is not asked here:
    M is then the exact number of tokens instead of the next of these.
    """
    off = flags.disable_cuda_graph or flags.enable_two_batch_overlap or flags.moe_a2a_backend != "none"
    if off or not at_least(release, NEW):
        return ()
    largest = min(_prefill_tokens(flags, card, release), _LARGEST_GRAPH)
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, largest + 1, 512))
    return tuple(size for start, stop, step in steps for size in range(start, stop, step) if size <= largest)


def ladder(flags: ServerFlags, card: Card, release: str, workload: AnyWorkload) -> tuple[int, ...]:
    """The rows to tune, ascending, at most `MAX_ROWS`.

    They hold what SGLang's tuner measures, the largest decode graph and prefill chunk of this server, and enough
    between that no M up to the largest is more than 1.5 times from its nearest row.
    """
    del workload  # every shape is run with the same rows; part of the signature so that a rule for one can come
    largest = _largest(flags, card, release)
    kept = _kept_rows(flags, card, release, largest)
    rows = {row for row in BASE_ROWS if row <= max(largest, BASE_ROWS[-1])} | kept
    top = max(rows)
    while top < largest:
        top = min(top * WORST_RATIO, largest)
        rows.add(top)
    return _thinned(_filled(rows), kept)


def _kept_rows(flags: ServerFlags, card: Card, release: str, largest: int) -> frozenset[int]:
    """The rows that the server runs most: largest decode pass, full prefill chunk, a single request."""
    decode = _decode_tokens(flags, card, release)
    alone = _draft_tokens(flags) * _dp_ranks(flags)
    chunk = _prefill_tokens(flags, card, release) * _dp_ranks(flags)
    return frozenset(min(row, largest) for row in (1, alone, decode, chunk))


def _largest(flags: ServerFlags, card: Card, release: str) -> int:
    """The largest M that the server runs, or `LARGEST_ROW`."""
    decode = _decode_tokens(flags, card, release)
    prefill = _prefill_tokens(flags, card, release) * _dp_ranks(flags)
    return min(max(decode, prefill + (decode if flags.enable_mixed_chunk else 0)), LARGEST_ROW)


def _prefill_tokens(flags: ServerFlags, card: Card, release: str) -> int:
    """Tokens of the largest prefill pass on one DP rank."""
    chunk = chunked_prefill_size(flags, card, release)
    return chunk if chunk > 0 else flags.max_prefill_tokens or DEFAULT_PREFILL_TOKENS


def _decode_tokens(flags: ServerFlags, card: Card, release: str) -> int:
    """Tokens of the largest decode pass, of all DP ranks together."""
    sizes = decode_graph_sizes(flags, card, release)
    batch = max(sizes) if sizes else decode_graph_max_batch(flags, card, release)
    return batch * _draft_tokens(flags) * _dp_ranks(flags)


def _filled(rows: set[int]) -> tuple[int, ...]:
    """The rows with more between where two neighbours are too far apart."""
    result = sorted(rows)
    for low, high in pairwise(sorted(rows)):
        step = low * WORST_RATIO
        while step < high:
            result.append(step)
            step *= WORST_RATIO
    return tuple(sorted(set(result)))


def _thinned(rows: tuple[int, ...], kept: frozenset[int]) -> tuple[int, ...]:
    """At most `MAX_ROWS` rows: the most crowded ones go first, none that is kept or whose loss would open a gap."""
    result = list(rows)
    while len(result) > MAX_ROWS:
        spare = [
            (after / before, row)
            for before, row, after in zip(result, result[1:], result[2:], strict=False)
            if row not in kept and after <= before * WORST_RATIO
        ]
        if not spare:
            break
        result.remove(min(spare)[1])
    return tuple(result)


def _decode_steps(flags: ServerFlags, release: str, largest: int) -> list[int]:
    """The graph sizes before they are cut off (server_args.py:4937-4968; 0.4.9: cuda_graph_runner.py:138-176)."""
    new = at_least(release, NEW)
    speculative = flags.speculative_algorithm is not None
    if flags.disable_cuda_graph_padding:
        return list(range(1, largest + 1)) if new else [*range(1, 33), *range(48, 161, 16)]
    if new and speculative:
        tail = range(272, largest + 1, 16)
        return [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *tail]
    if new:
        return [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, largest + 1, 32)]
    head = [*range(1, 9), *range(10, 33, 2), *range(40, 64, 8), *range(80, 161, 16)]
    first = head if speculative else [1, 2, 4, 8, *range(16, 161, 8)]
    return [*first, *range(160, 257, 8), *range(256, largest + 1, 16)]


def _running_requests(flags: ServerFlags) -> int | None:
    """The user's limit on running requests on one DP rank, or the one of speculative decoding."""
    default = _SPECULATIVE_REQUESTS if flags.speculative_algorithm else None
    limit = flags.max_running_requests or default
    return max(1, limit // _dp_ranks(flags)) if limit else None


def _draft_tokens(flags: ServerFlags) -> int:
    """Tokens that one request verifies in a pass; 1 without speculative decoding."""
    if flags.speculative_algorithm is None:
        return 1
    if flags.speculative_num_steps and flags.speculative_eagle_topk in (None, 1):
        return flags.speculative_num_steps + 1
    ngram = flags.speculative_algorithm.upper() == "NGRAM"
    return flags.speculative_num_draft_tokens or (12 if ngram else 4)


def _dp_ranks(flags: ServerFlags) -> int:
    """DP ranks whose tokens are gathered for the experts; 1 without DP attention."""
    return flags.dp_size if flags.enable_dp_attention else 1


def _attention_ranks(flags: ServerFlags) -> int:
    return max(1, flags.tp_size // _dp_ranks(flags))
