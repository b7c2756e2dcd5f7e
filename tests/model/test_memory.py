"""Weights against a card's memory, in one sentence."""

from __future__ import annotations

import pytest

from fixer.machine.cards import Card, find_card
from fixer.model.memory import SPLITS, FitOutcome, weights_fit

RTX_4090 = find_card("RTX 4090")
QWEN3_30B_FP8 = 31_200_000_000


@pytest.mark.parametrize(
    ("size", "card", "split", "outcome", "sentence"),
    [
        (
            *(QWEN3_30B_FP8, "RTX 4090", {}, FitOutcome.DOES_NOT_FIT),
            "31 GB of weights, one RTX 4090 has 24 GB: does not fit; --tp 2 does",
        ),
        (
            *(QWEN3_30B_FP8, "RTX 4090", {"count": 1}, FitOutcome.DOES_NOT_FIT),
            "31 GB of weights, one RTX 4090 has 24 GB: does not fit; --tp 2 does, with 2 such cards (here: 1)",
        ),
        (
            *(QWEN3_30B_FP8, "RTX 4090", {"tp": 2, "count": 2}, FitOutcome.FITS),
            "31 GB of weights, about 16 GB on each of 2 RTX 4090 with 24 GB: fits",
        ),
        (
            *(QWEN3_30B_FP8, "RTX 4090", {"pp": 2}, FitOutcome.FITS),
            "31 GB of weights, about 16 GB on each of 2 RTX 4090 with 24 GB: fits",
        ),
        (
            *(13_800_000_000, "RTX 4090", {"count": 1}, FitOutcome.FITS),
            "14 GB of weights, one RTX 4090 has 24 GB: fits",
        ),
        (
            *(22_500_000_000, "RTX 4090", {}, FitOutcome.TIGHT),
            "22 GB of weights, one RTX 4090 has 24 GB: little is left for the KV cache; --tp 2 does",
        ),
        (
            *(470_000_000_000, "H100", {"tp": 4, "count": 8}, FitOutcome.DOES_NOT_FIT),
            "470 GB of weights, about 118 GB on each of 4 H100 80GB HBM3 with 80 GB: does not fit; --tp 8 does",
        ),
        (
            *(10**15, "RTX 4090", {}, FitOutcome.DOES_NOT_FIT),
            "1000000 GB of weights, one RTX 4090 has 24 GB: does not fit; no --tp up to 64 does: "
            "take a smaller model or number format",
        ),
        (
            *(20_000_000_000, "RTX 4090", {"fraction": 0.5}, FitOutcome.DOES_NOT_FIT),
            "20 GB of weights, one RTX 4090 has 24 GB: does not fit; --tp 2 does",
        ),
        (0, "RTX 4090", {}, FitOutcome.FITS, "0.0 GB of weights, one RTX 4090 has 24 GB: fits"),
        (None, "RTX 4090", {}, FitOutcome.NOT_KNOWN, "whether the weights fit into RTX 4090 is not known"),
    ],
)
def test_the_sentence(size: int | None, card: str, split: dict[str, float], outcome: FitOutcome, sentence: str) -> None:
    found = weights_fit(size, find_card(card), **split)  # type: ignore[arg-type]
    assert (found.outcome, found.sentence) == (outcome, sentence)


def test_a_card_whose_memory_is_not_known() -> None:
    card = Card("NVIDIA X", (9, 0), 232448, 0)
    assert weights_fit(1, card).outcome is FitOutcome.NOT_KNOWN


@pytest.mark.parametrize("size", [10**9, 10**10, 3 * 10**10, 10**11, 5 * 10**11])
@pytest.mark.parametrize("pp", [1, 2])
def test_the_proposed_split_fits_and_the_one_before_it_does_not(size: int, pp: int) -> None:
    smallest = weights_fit(size, RTX_4090, pp=pp).smallest_tp
    assert smallest is not None
    assert weights_fit(size, RTX_4090, smallest, pp).outcome is FitOutcome.FITS
    if smallest > 1:
        before = SPLITS[SPLITS.index(smallest) - 1]
        assert weights_fit(size, RTX_4090, before, pp).outcome is not FitOutcome.FITS


def test_a_larger_split_than_need_be_is_not_advised_against() -> None:
    assert weights_fit(10**9, RTX_4090, 8).sentence.endswith("fits")
