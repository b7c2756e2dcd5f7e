from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.artefacts.artefact import Decision
from fixer.tuning.duel import LEAST_GAIN, Duel, DuelRequest, KernelDuel, Via, rounds_for
from fixer.tuning.row_choice import row_choice
from fixer.workload import RowTiles, Tile

TUNED = RowTiles(Tile(16, 64, 128, 1, 4, 4), Tile(16, 128, 128, 1, 4, 4))
OWN = RowTiles(Tile(64, 64, 32, 8), Tile(64, 64, 32, 8))
OWN_TMA = RowTiles(Tile(64, 64, 32, 8), Tile(64, 64, 32, 8, use_tma=True))
STEADY = tuple(1 + step / 10_000 for step in (-3, -2, -1, 0, 1, 2, 3))
NOISY = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


def duel(own: float | None, tuned: float, spread=STEADY, via=Via.LAYER) -> Duel:
    """Rounds around two medians; None where SGLang's own was not timed."""
    return Duel(8, via, tuple(own * turn for turn in spread) if own else (), tuple(tuned * turn for turn in spread))


def kernel_duel(own: float | None, tuned: float, spread=STEADY, pair=OWN) -> KernelDuel:
    medians = {kernel: tuned * share for kernel, share in zip(TUNED.kernels, (0.6, 0.4), strict=True)}
    if own:
        medians |= {kernel: own * share for kernel, share in zip(pair.kernels, (0.6, 0.4), strict=True)}
    return KernelDuel(duel(own, tuned, spread, Via.KERNELS), medians)


def only_tuned() -> KernelDuel:
    return kernel_duel(None, 80)


# --- duels -----------------------------------------------------------------------------------------------------------


def test_a_clear_win():
    clear = duel(100, 80)
    assert clear.gain == pytest.approx(0.25)
    assert 0 < clear.noise < 0.001
    assert clear.is_won
    assert not duel(80, 100).is_won
    assert duel(80, 100).gain == pytest.approx(-0.2)


def test_a_gain_within_the_noise_is_lost():
    blurred = duel(100, 95, NOISY)
    assert blurred.gain > 0.05
    assert blurred.gain < 3 * blurred.noise
    assert not blurred.is_won
    assert duel(100, 95).is_won  # the same gain, measured well


def test_the_bar_is_three_standard_errors():
    # Medians 100 and t; absolute deviations of 2 % of each side: the gain's standard error is known in closed form.
    error = 1.2533 * 1.4826 * 0.02 / math.sqrt(7)
    noise = math.sqrt(2) * error
    spread = tuple(1 + step / 100 for step in (-4, -2, -1, 0, 1, 2, 4))
    assert statistics.median(abs(turn - 1) for turn in spread) == pytest.approx(0.02)
    assert duel(100, 100, spread).noise == pytest.approx(noise)
    assert duel(100 * (1 + 3 * noise + 0.001), 100, spread).is_won
    assert not duel(100 * (1 + 3 * noise - 0.001), 100, spread).is_won


def test_a_tiny_gain_is_lost_however_sure_it_is():
    exact = (1.0,) * 7
    assert duel(100, 100, exact).noise == 0
    assert not duel(100 * (1 + LEAST_GAIN * 0.9), 100, exact).is_won
    assert duel(100 * (1 + LEAST_GAIN * 1.1), 100, exact).is_won


def test_an_opponent_that_cannot_run_has_lost():
    alone = duel(None, 80)
    assert (alone.gain, alone.noise, alone.is_won) == (0.0, 0.0, True)


def test_few_rounds_prove_nothing():
    assert duel(100, 10, (1.0, 1.0)).noise == math.inf
    assert not duel(100, 10, (1.0, 1.0)).is_won


def test_one_outlier_changes_no_verdict():
    assert duel(100, 80, (*STEADY[:-1], 9.0)).is_won


def test_joined_duels_have_all_times_and_less_noise():
    spread = tuple(1 + step / 100 for step in (-4, -2, -1, 0, 1, 2, 4))
    one = duel(103, 100, spread)
    both = one.joined(duel(103, 100, spread))
    assert (both.tokens, both.via) == (8, Via.LAYER)
    assert both.own == one.own * 2
    assert both.tuned == one.tuned * 2
    assert both.noise == pytest.approx(one.noise / math.sqrt(2))
    assert both.gain == pytest.approx(one.gain)


@given(st.floats(0, 1e9), st.floats(0.001, 10))
def test_rounds_are_bounded_and_fit_the_budget(microseconds, budget):
    rounds = rounds_for(microseconds, budget)
    assert 7 <= rounds <= 25
    assert rounds == 7 or rounds * microseconds <= budget * 1e6 or microseconds < 1


def test_rounds_by_the_graph():
    assert [rounds_for(us) for us in (0.0, 1.0, 10_000.0, 1e9)] == [25, 25, 12, 7]


# --- a row's verdict -------------------------------------------------------------------------------------------------


def choose(own, layer, kernels, sglang_own=OWN, tuned=TUNED):
    duel = layer or kernels.duel
    return row_choice(DuelRequest(8, own, tuned), sglang_own, duel, kernels.medians if kernels else {})


def test_the_tuned_pair_wins():
    row = choose(OWN, duel(100, 80), kernel_duel(50, 40))
    assert (row.batch, row.decision) == (8, Decision.TUNED)
    assert (row.gate_up, row.down) == (TUNED.gate_up, TUNED.down)
    assert row.times == pytest.approx((24.0, 16.0, 30.0, 20.0))
    assert row.layer_times == pytest.approx((80, 100))
    assert row.noise == pytest.approx(duel(100, 80).noise)


def test_sglangs_own_is_kept():
    row = choose(OWN, duel(100, 100.5), kernel_duel(50, 40))
    assert row.decision is Decision.KEPT_SGLANG
    assert (row.gate_up, row.down) == (OWN.gate_up, OWN.down)
    assert row.times == pytest.approx((30, 20, 30, 20))  # of the pair that is installed
    assert row.layer_times == pytest.approx((100, 100))


def test_the_layer_is_the_judge_where_both_were_timed():
    assert choose(OWN, duel(100, 101), kernel_duel(50, 40)).decision is Decision.KEPT_SGLANG
    assert choose(OWN, duel(100, 80), kernel_duel(40, 50)).decision is Decision.TUNED


def test_without_a_layer_the_kernels_judge():
    row = choose(OWN, None, kernel_duel(50, 40))
    assert row.decision is Decision.TUNED
    assert row.layer_times == (None, None)
    row = choose(OWN, None, kernel_duel(40, 50))
    assert row.decision is Decision.KEPT_SGLANG
    assert row.gate_up == OWN.gate_up


def test_without_the_kernels_the_layer_judges():
    row = choose(OWN, duel(100, 80), None)
    assert row.decision is Decision.TUNED
    assert row.times == (None,) * 4
    assert row.layer_times == pytest.approx((80, 100))


def test_the_same_pair_is_kept():
    kernels = only_tuned()
    row = choose(None, duel(None, 80), kernels, sglang_own=TUNED)
    assert row.decision is Decision.KEPT_SGLANG
    assert (row.gate_up, row.down) == (TUNED.gate_up, TUNED.down)
    assert row.times == pytest.approx((48, 32, 48, 32))
    assert row.layer_times == pytest.approx((80, 80))
    assert row.noise is None
    assert choose(None, None, kernels, sglang_own=TUNED).decision is Decision.KEPT_SGLANG


def test_where_sglangs_own_does_not_run_ours_is_known_to_fit():
    row = choose(None, duel(None, 80), only_tuned())
    assert row.decision is Decision.FITTING_ONLY
    assert (row.gate_up, row.down) == (TUNED.gate_up, TUNED.down)
    assert row.times == pytest.approx((48, 32, None, None))
    assert row.layer_times == pytest.approx((80, None))
    assert choose(None, None, only_tuned()).decision is Decision.FITTING_ONLY


def test_where_only_the_layer_failed_sglangs_own_does_not_run_either():
    # Asked for, but the measuring process found that it does not load: the duel has no times for it.
    row = choose(OWN, None, only_tuned())
    assert row.decision is not Decision.TUNED


def test_a_tma_file_is_kept_where_no_layer_can_time_it():
    row = choose(OWN_TMA, None, only_tuned(), sglang_own=OWN_TMA)
    assert (row.gate_up, row.down) == (OWN_TMA.gate_up, OWN_TMA.down)
    assert row.decision in (Decision.KEPT_SGLANG, Decision.FITTING_ONLY)
    assert row.down.use_tma


def test_a_tma_file_is_judged_through_the_layer():
    assert choose(OWN_TMA, duel(100, 80), only_tuned(), sglang_own=OWN_TMA).decision is Decision.TUNED
    row = choose(OWN_TMA, duel(80, 100), only_tuned(), sglang_own=OWN_TMA)
    assert (row.decision, row.down) == (Decision.KEPT_SGLANG, OWN_TMA.down)
    assert row.layer_times == pytest.approx((80, 80))


def test_noise_that_is_not_finite_is_left_out():
    row = choose(OWN, duel(100, 10, (1.0, 1.0)), kernel_duel(50, 40))
    assert (row.decision, row.noise) == (Decision.KEPT_SGLANG, None)


@given(st.floats(1, 1e5), st.floats(1, 1e5), st.floats(0, 0.2))
def test_a_row_is_never_slower_than_sglangs_own(own, tuned, spread):
    layer = duel(own, tuned, tuple(1 + spread * step for step in (-1, -0.5, -0.2, 0, 0.2, 0.5, 1)))
    row = choose(OWN, layer, None)
    assert row.layer_us <= row.sglang_layer_us
    assert (row.decision is Decision.TUNED) == layer.is_won
