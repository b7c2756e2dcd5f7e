"""Whether a model's weights fit into a card's memory, said before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fixer.machine.cards import Card

USABLE = 0.9
"""The part of a card's memory for weights and KV cache where --mem-fraction-static is not given.

SGLang works out less: about 0.77 at 16 GB, 0.85 at 24 GB, 0.87 at 80 GB, or nearly all (server_args.py:4753-4788 of
0.5.17). The most that it takes is what counts here: a model that fits must not be called too large.
"""

LEAST_CACHE = 0.05
"""With less than this part of the memory left for the KV cache a server holds few requests, or does not start."""

SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""The values of --tp that are proposed."""


class FitOutcome(Enum):
    """What is known of a model's weights and a card's memory."""

    FITS = "fits"
    TIGHT = "tight"
    """They fit, with little left for the KV cache."""
    DOES_NOT_FIT = "does_not_fit"
    NOT_KNOWN = "not_known"
    """The weights' size or the card's memory is not known."""


@dataclass(frozen=True)
class WeightsFit:
    """The answer of `weights_fit`.

    Attributes:
        outcome: what is known.
        sentence: for people: "31 GB of weights, one RTX 4090 has 24 GB: does not fit; --tp 2 does".
        smallest_tp: the smallest value of --tp with which they fit, None where none is known.
    """

    outcome: FitOutcome
    sentence: str
    smallest_tp: int | None = None


def weights_fit(
    size: int | None, card: Card, tp: int = 1, pp: int = 1, count: int = 0, fraction: float | None = None
) -> WeightsFit:
    """Whether each shard's part of the weights fits into one card.

    A shard has about `size / (tp * pp)` bytes: norms, and heads that do not divide, are on every rank.

    Args:
        size: bytes of the files that SGLang loads (`weights.choose`); None where they are not known.
        card: the kind of card; a memory of 0 MiB is not known.
        tp, pp: tensor and pipeline parallel ranks.
        count: cards of that kind that are there, 0 where that is not known.
        fraction: --mem-fraction-static, None for SGLang's own choice.
    """
    if size is None or not card.memory_mib:
        return WeightsFit(FitOutcome.NOT_KNOWN, f"whether the weights fit into {short_name(card)} is not known")
    memory = card.memory_mib << 20
    usable = memory * (USABLE if fraction is None else fraction)
    smallest = next((split for split in SPLITS if size / (split * pp) <= usable - LEAST_CACHE * memory), None)
    shard = size / (tp * pp)
    told = f"{_gigabytes(size)} of weights, {_shares(shard, tp * pp, card)}"
    if shard <= usable - LEAST_CACHE * memory:
        return WeightsFit(FitOutcome.FITS, f"{told}: fits", smallest)
    advice = _advice(smallest, tp, pp, count)
    if shard <= usable:
        return WeightsFit(FitOutcome.TIGHT, f"{told}: little is left for the KV cache; {advice}", smallest)
    return WeightsFit(FitOutcome.DOES_NOT_FIT, f"{told}: does not fit; {advice}", smallest)


def short_name(card: Card) -> str:
    """The card's name without its maker's: "RTX 4090"."""
    return card.name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def _shares(shard: float, cards: int, card: Card) -> str:
    has = f"{round(card.memory_mib / 1024)} GB"
    if cards == 1:
        return f"one {short_name(card)} has {has}"
    return f"about {_gigabytes(shard)} on each of {cards} {short_name(card)} with {has}"


def _advice(smallest: int | None, tp: int, pp: int, count: int) -> str:
    if smallest is None:
        return f"no --tp up to {SPLITS[-1]} does: take a smaller model or number format"
    if smallest <= tp:
        return "take a larger --mem-fraction-static, or a smaller model or number format"
    does = f"--tp {smallest} does"
    return f"{does}, with {smallest * pp} such cards (here: {count})" if 0 < count < smallest * pp else does


def _gigabytes(size: float) -> str:
    value = size / 1e9
    return f"{value:.0f} GB" if value >= 10 else f"{value:.1f} GB"
