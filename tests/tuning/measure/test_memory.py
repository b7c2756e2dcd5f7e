"""How measuring makes do with the memory that a card has left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixer.families.fused_moe.arguments import Product
from fixer.tuning.measure.memory import (
    COLD_FACTOR,
    full_rotation,
    layer_room,
    needed_bytes,
    rotations,
    smallest_rotation,
    with_spare,
)
from fixer.workload import BOTH, NumberFormat, Projection, Workload

L2 = 50 << 20
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
DEEPSEEK = Workload(257, 2048, 7168, 9, NumberFormat.FP8_W8A8, block_shape=(128, 128))
SMALL = Workload(8, 64, 128, 2)


def products(workload, tokens=4096):
    return {projection: Product(workload, projection, tokens) for projection in BOTH}


def needed(chosen, of):
    return with_spare(sum(needed_bytes(of[projection], chosen[projection]) for projection in of))


def weight_bytes(product, rotation):
    """Of one projection's FP8 or bf16 weights."""
    one = 1 if product.workload.number_format is NumberFormat.FP8_W8A8 else 2
    return rotation.copies * rotation.experts * product.columns * product.depth * one


@pytest.mark.parametrize("workload", [QWEN, DEEPSEEK, SMALL])
def test_a_free_card_takes_all_of_it(workload):
    of = products(workload)
    chosen = rotations(of, L2, 80 << 30)
    assert chosen == {projection: full_rotation(of[projection], L2) for projection in BOTH}
    assert all(rotation.experts == workload.experts for rotation in chosen.values())


def test_a_small_layer_has_copies():
    product = Product(SMALL, Projection.GATE_UP, 16)
    assert full_rotation(product, L2).copies == 16
    assert full_rotation(Product(QWEN, Projection.GATE_UP, 16), L2).copies == 1


@pytest.mark.parametrize("workload", [QWEN, DEEPSEEK])
def test_a_fuller_card_takes_fewer_experts_and_stays_cold(workload):
    of = products(workload)
    full = needed(rotations(of, L2, 80 << 30), of)
    before = workload.experts
    for free in (full - 1, full * 3 // 4, full // 2):
        chosen = rotations(of, L2, free)
        if chosen is None:
            assert free < needed({p: smallest_rotation(of[p], L2) for p in of}, of)
            continue
        assert needed(chosen, of) <= free
        experts = chosen[Projection.GATE_UP].experts
        assert experts < workload.experts
        assert experts <= before
        before = experts
        assert all(weight_bytes(of[p], chosen[p]) >= COLD_FACTOR * L2 for p in of)
    assert before < workload.experts


def test_deepseek_fits_a_card_that_holds_a_tenth_of_its_layer():
    of = products(DEEPSEEK, 1024)
    assert needed(rotations(of, L2, 80 << 30), of) > 11 << 30
    chosen = rotations(of, L2, 3 << 30)
    assert chosen is not None
    assert 10 <= chosen[Projection.GATE_UP].experts < 64


@settings(max_examples=300, deadline=None)
@given(
    free=st.integers(0, 1 << 37),
    experts=st.integers(1, 512),
    intermediate=st.sampled_from([64, 768, 2048, 14336]),
    hidden=st.sampled_from([128, 2048, 7168]),
    tokens=st.sampled_from([1, 128, 8192]),
    l2=st.sampled_from([6 << 20, 50 << 20, 128 << 20]),
)
def test_what_is_chosen_fits_or_nothing_does(free, experts, intermediate, hidden, tokens, l2):
    of = products(Workload(experts, intermediate, hidden, min(8, experts)), tokens)
    chosen = rotations(of, l2, free)
    if chosen is None:
        assert needed({p: smallest_rotation(of[p], l2) for p in of}, of) > free
        return
    assert needed(chosen, of) <= free
    for projection, rotation in chosen.items():
        assert 1 <= rotation.experts <= experts
        full = full_rotation(of[projection], l2)
        cold = min(COLD_FACTOR * l2, weight_bytes(of[projection], full))
        assert weight_bytes(of[projection], rotation) >= cold


def test_sglangs_layer_counts_its_passing_results():
    copies, few = layer_room(QWEN, 1, L2)
    _, many = layer_room(QWEN, 4096, L2)
    assert copies == 1
    # 4096 tokens times 8 experts: gate-up [2 * 768], activations [768], down [2048], in bfloat16.
    assert many - few >= 4095 * 8 * (1536 + 768 + 2048) * 2
    weights = 128 * 3 * 768 * 2048
    assert weights < few < 2 * weights + (600 << 20)
