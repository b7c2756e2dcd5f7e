"""Which rows a load touches, with a published tuning of an H100: its rows from M = 2048 on are SGLang's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixer.artefacts.artefact import Artefact
from fixer.bench.batch_sizes import batch_sizes, empty_load
from fixer.bench.passes import Load
from fixer.bench.subject import Subject
from fixer.machine.cards import find_card
from fixer.sglang.flags import parse_flags

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h100"
PREFILL = Load(1, 4000, 1, 16)


@pytest.fixture
def subject(trees, tmp_path):
    def made(*flags: str, file: str = "qwen3-30b-a3b-fp8-dynamic") -> Subject:
        artefact = Artefact.from_json((RESULTS / f"{file}.artefact.json").read_bytes())
        card = find_card(artefact.environment.card)
        parsed = parse_flags(["--model", "m", *flags])
        situation = SimpleNamespace(flags=parsed, tree=trees["0.5.17"])
        limit = artefact.environment.shared_memory
        on = SimpleNamespace(card=replace(card, shared_memory=limit))
        return Subject(situation, on, artefact, tmp_path, None if limit == card.shared_memory else limit, limit)

    return made


def test_a_prefill_whose_rows_are_sglangs_own_is_the_same_configuration(subject):
    """The published page called it "+13.3 % faster"."""
    load = empty_load(subject(), PREFILL)
    assert load.same
    assert load.most == 1.0
    # With the smaller limit every row was faster.
    limited = empty_load(subject(file="qwen3-30b-a3b-fp8-dynamic.101376"), PREFILL)
    assert not limited.same
    assert limited.most > 1.05


def test_what_the_layer_can_give_under_a_load_of_decoding(subject):
    """The published page called 1 stream "+10.0 % faster", from a layer that gains 6.9 % at M = 1."""
    load = empty_load(subject(), Load(1, 128, 128, 4))
    assert not load.same
    assert load.most == pytest.approx((127 * 31.17 + 238.6) / (127 * 29.02 + 227.7), rel=1e-3)
    # 16 streams decode together: each request has a sixteenth of those passes, and a prefill of its own.
    load = empty_load(subject(), Load(16, 512, 129, 32))
    assert load.most == pytest.approx((8 * 147.5 + 281.6) / (8 * 136.7 + 263.1), rel=1e-3)
    # A prompt of 4000 at M = 4096, where both sides are the same, beside few tokens.
    load = empty_load(subject(), Load(1, 4000, 3, 4))
    assert not load.same
    assert load.most == pytest.approx((2 * 31.17 + 632.4) / (2 * 29.02 + 632.4), rel=1e-3)


def test_batch_sizes(subject):
    assert batch_sizes(subject(), Load(1, 100, 1, 1)) == set(range(100, 154))
    # The prompt's chunks: 8192 and what is left of it.
    assert batch_sizes(subject(), Load(1, 8200, 1, 1)) == {*range(8, 16), *range(8192, 12292)}
    # Five streams are padded to the next graph, eight.
    decode = batch_sizes(subject(), Load(5, 100, 2, 5))
    assert decode == {*range(1, 9), *range(100, 754)}
    chunked = batch_sizes(subject("--chunked-prefill-size", "256"), Load(5, 100, 1, 5))
    assert {1, 256} <= chunked
    assert max(chunked) == 256 + 128 + 3


@pytest.mark.parametrize(
    "flags",
    [
        ("--enable-mixed-chunk",),
        ("--enable-two-batch-overlap",),
        ("--speculative-algorithm", "EAGLE"),
        ("--tp", "2", "--dp", "2", "--enable-dp-attention"),
    ],
)
def test_where_moefix_cannot_say_nothing_is_called_the_same(subject, flags):
    load = empty_load(subject(*flags), PREFILL)
    assert (load.same, load.most) == (False, None)
