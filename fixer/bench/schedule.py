"""What a comparison of servers runs: its loads, and the servers' starts in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fixer.base.errors import UsageError
from fixer.bench.passes import Load
from fixer.bench.results import Side
from fixer.bench.verdict import FEWEST_STARTS

FULL_LOADS = (
    Load(1, 256, 256, 8),
    Load(4, 512, 256, 32),
    Load(16, 512, 256, 96),
    Load(64, 512, 256, 256),
    Load(1, 8000, 1, 40),
)
"""Decoding at 1, 4, 16 and 64 streams, and a long prefill: one pass of all takes 75 seconds on an H100 (30B-A3B)."""

QUICK_LOADS = (
    Load(1, 128, 128, 4),
    Load(4, 256, 128, 8),
    Load(16, 512, 128, 32),
    Load(64, 512, 128, 128),
    Load(1, 4000, 1, 16),
)
"""The same with fewer and shorter requests: one pass of all takes 15 seconds."""

MOST_REQUESTS, MOST_TOKENS, MOST_STREAMS = 100_000, 1_000_000, 4096
"""Bounds of a load: more is a slip of the keyboard."""


@dataclass(frozen=True)
class ServePlan:
    """How to measure.

    Attributes:
        loads: in this order on each start.
        rounds: starts of each side.
        passes: measured passes of each load on each start.
        full_warm: the warm pass has as many requests as a measured one, not just one for each stream.
        wait_seconds: how long a server may take to become healthy.
    """

    loads: tuple[Load, ...] = FULL_LOADS
    rounds: int = FEWEST_STARTS
    passes: int = 2
    full_warm: bool = True
    wait_seconds: float = 600.0


def parse_loads(text: str, preset: Sequence[Load]) -> tuple[Load, ...]:
    """Loads from the command line: "1,16,prefill" picks of the preset, "16:512:128:48" spells one out.

    The parts are streams, input tokens, output tokens and requests.

    Raises:
        UsageError: it makes no sense.
    """
    known = {"prefill" if load.is_prefill else str(load.streams): load for load in preset}
    loads = tuple(_load(part.strip(), known) for part in text.split(","))
    if len(set(loads)) != len(loads):
        raise UsageError(f"--loads {text[:60]!r} names a load twice")
    return loads


def _load(part: str, known: Mapping[str, Load]) -> Load:
    if part in known:
        return known[part]
    words = part.split(":")
    if len(words) != 4 or not all(word.isascii() and word.isdigit() and len(word) < 9 for word in words):
        raise UsageError(
            f"--loads: {part[:40]!r} is no load",
            f"Choose of {', '.join(known)}, or write STREAMS:INPUT:OUTPUT:REQUESTS, such as 16:512:128:48.",
        )
    load = Load(*map(int, words))
    bounds = ((load.streams, MOST_STREAMS), (load.requests, MOST_REQUESTS))
    tokens = ((load.input_tokens, MOST_TOKENS), (load.output_tokens, MOST_TOKENS))
    if not all(1 <= value <= most for value, most in (*bounds, *tokens)) or load.requests < load.streams:
        raise UsageError(f"--loads: {part} is out of bounds", "Each part is at least 1, and requests at least streams.")
    return load


@dataclass(frozen=True)
class Start:
    """One start of a server: of which comparison, which side, and its number there."""

    subject: int
    side: Side
    number: int


def schedule(subjects: int, rounds: int) -> tuple[Start, ...]:
    """The starts in order. The sides take turns in going first (own, tuned, tuned, own, ...).

    So a machine that becomes faster or slower over the minutes helps neither side.
    """
    starts = []
    for round_ in range(rounds):
        for subject in range(subjects):
            sides = (Side.SGLANG, Side.TUNED) if (round_ + subject) % 2 == 0 else (Side.TUNED, Side.SGLANG)
            starts += [Start(subject, side, 2 * round_ + place) for place, side in enumerate(sides)]
    return tuple(starts)
