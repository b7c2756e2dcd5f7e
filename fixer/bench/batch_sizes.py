"""Which batch sizes M a load has the MoE layer run, and whether the two sides differ there at all.

M is what SGLang looks a row up by: the running requests in a decode pass, the tokens of a chunk in prefill.
"""

from __future__ import annotations

from collections.abc import Iterator

from fixer.artefacts.gains import compared_times
from fixer.bench.passes import Load
from fixer.bench.results import ServeLoad
from fixer.bench.subject import Subject
from fixer.model.rules.ladder import DEFAULT_PREFILL_TOKENS, chunked_prefill_size, decode_graph_sizes
from fixer.sglang.flags import ServerFlags

MOST_BATCH = 1 << 16
"""Larger ones are not asked about: no prefill chunk is."""


def empty_load(subject: Subject, load: Load) -> ServeLoad:
    """A load without a pass, with what the tuning can do under it."""
    batches = batch_sizes(subject, load)
    if batches is None:
        return ServeLoad(load)
    same = all(subject.own_pair(batch) == subject.tuned_pair(batch) for batch in batches)
    return ServeLoad(load, same=same, most=_layer_ratio(subject, load))


def batch_sizes(subject: Subject, load: Load) -> set[int] | None:
    """Every M that the load may have, and perhaps more; None where moefix cannot say.

    Decoding: 1 to the number of streams, padded to the next captured graph. Prefill: what is left of a prompt after
    full chunks, full chunks, and with several streams all between; padded by less than half to the next graph
    (server_args.py of 0.5.17: sizes of prefill graphs grow by a quarter at most above 48).
    """
    flags, card, release = subject.situation.flags, subject.card, subject.situation.tree.version
    if _mixes(flags):
        return None
    exact = _prefills(load, _chunk(subject))
    batches = {size for tokens in exact for size in range(tokens, tokens + tokens // 2 + 4)}
    if not load.is_prefill:
        graphs = decode_graph_sizes(flags, card, release)
        batches |= set(range(1, min((size for size in graphs if size >= load.streams), default=load.streams) + 1))
    return {batch for batch in batches if batch <= MOST_BATCH}


def _layer_ratio(subject: Subject, load: Load) -> float | None:
    """The layer's own time over the tuned one in the passes of a request: its prefill alone, its share of decoding.

    None where a row that they look up was not compared.
    """
    chunk = _chunk(subject)
    full, rest = divmod(load.input_tokens, chunk)
    passes = ((chunk, full), (rest, min(rest, 1)), (load.streams, (load.output_tokens - 1) / load.streams))
    own = tuned = 0.0
    for tokens, count in passes:
        if count:
            times = compared_times(subject.row(tokens))
            if times is None:
                return None
            own, tuned = own + count * times[0], tuned + count * times[1]
    return round(own / tuned, 5)


def _chunk(subject: Subject) -> int:
    """Tokens of a full prefill pass."""
    flags = subject.situation.flags
    chunk = chunked_prefill_size(flags, subject.card, subject.situation.tree.version)
    return chunk if chunk > 0 else flags.max_prefill_tokens or DEFAULT_PREFILL_TOKENS


def _prefills(load: Load, chunk: int) -> Iterator[int]:
    """Tokens of the prefill passes."""
    if load.streams == 1:
        yield from {min(load.input_tokens, chunk), load.input_tokens % chunk} - {0}
        return
    together = load.streams * load.input_tokens
    yield from range(load.input_tokens if together <= chunk else 1, min(together, chunk) + 1)


def _mixes(flags: ServerFlags) -> bool:
    """Whether M is something else than one rank's requests or tokens."""
    other = flags.enable_dp_attention or flags.enable_two_batch_overlap or flags.enable_mixed_chunk
    return other or flags.speculative_algorithm is not None
