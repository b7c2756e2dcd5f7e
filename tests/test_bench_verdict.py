"""When a difference counts."""

import math
import random

import pytest

from fixer.bench_results import Arm, Arms, Load, ServeLoad, Verdict
from fixer.bench_verdict import (
    LEAST_DIFFERENCE,
    LEAST_DIFFERENCE_OF_ONE_START,
    compare,
    judged,
    judged_row,
    overall,
    overall_rows,
    student,
    verdict,
)
from fixer.tuning.duel import Duel, Via

LOAD = Load(16, 512, 128, 48)


def load(own, tuned, starts=((0, 0, 3, 3), (1, 1, 2, 2))):
    arms = [Arm(tuple(values), tuple(start[: len(values)])) for values, start in zip((own, tuned), starts, strict=True)]
    return judged(ServeLoad(LOAD, Arms(*arms)))


def logs(values):
    return {start: [math.log(value) for value in passes] for start, passes in values.items()}


def test_quantiles_of_students_t():
    """For one and two degrees of freedom they have a closed form: tan(pi (p - 1/2)), (2p - 1) sqrt(2 / (4p(1 - p)))."""
    assert student(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-3)
    assert student(2) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), rel=1e-3)
    assert student(1000) == student(20)
    assert all(student(n) > student(n + 1) > 1.96 for n in range(1, 20))


def test_a_clear_difference_counts_and_a_small_one_does_not():
    assert load([100, 101, 100, 101], [110, 111, 110, 111]).verdict is Verdict.FASTER
    assert load([110, 111, 110, 111], [100, 101, 100, 101]).verdict is Verdict.SLOWER
    small = load([100.0, 100.01, 100.0, 100.01], [100.8, 100.81, 100.8, 100.81])
    assert (small.verdict, small.margin) == (Verdict.NEUTRAL, LEAST_DIFFERENCE)
    assert small.ratio == pytest.approx(1.008, abs=1e-4)
    assert load([100, 112, 100, 112], [106, 118, 106, 118]).verdict is Verdict.NEUTRAL


def test_starts_that_differ_are_noise_too():
    """Passes of one start that agree with one another to the digit say nothing of the next start."""
    own, tuned = [100, 100, 104, 104], [106, 106, 102.5, 102.5]
    apart = load(own, tuned)
    assert apart.verdict is Verdict.NEUTRAL
    assert apart.margin > 0.06
    assert apart.spread == pytest.approx(0.04, abs=1e-3)


def test_one_start_of_each_side_counts_from_two_per_cent():
    starts = ((0, 0), (1, 1))
    assert load([100, 100.1], [101.5, 101.6], starts).verdict is Verdict.NEUTRAL
    assert load([100, 100.1], [101.5, 101.6], starts).margin == LEAST_DIFFERENCE_OF_ONE_START
    assert load([100, 100.1], [103.5, 103.6], starts).verdict is Verdict.FASTER


def test_no_verdict_before_each_side_has_two_passes():
    assert load([], [100.0]).ratio is None
    early = load([100.0], [110.0, 110.0])
    assert early.ratio == pytest.approx(1.1)
    assert early.verdict is early.margin is early.spread is None
    assert compare({}, {}) == (None, None)


def test_two_sides_that_are_alike_are_seldom_told_apart():
    """Passes with 1 % of noise and starts with 1 %: the interval may err 5 times in 100, each way counted."""
    chance = random.Random(5)

    def side(starts):
        places = {start: chance.gauss(0, 0.01) for start in starts}
        return {start: [place + chance.gauss(0, 0.01) for _ in range(2)] for start, place in places.items()}

    verdicts = [verdict(*compare(side((0, 3)), side((1, 2)))) for _ in range(2000)]
    wrong = sum(one is not Verdict.NEUTRAL for one in verdicts) / len(verdicts)
    assert wrong < 0.06
    seen = [
        verdict(*compare(side((0, 3)), {start: [v + 0.15 for v in values] for start, values in side((1, 2)).items()}))
        for _ in range(300)
    ]
    assert sum(one is Verdict.FASTER for one in seen) > 270


def test_a_verdict_is_the_same_from_either_side():
    assert verdict(1.02, 0.019) is Verdict.FASTER
    assert verdict(1 / 1.02, 0.019) is Verdict.SLOWER
    assert verdict(1.02, 0.021) is verdict(1 / 1.02, 0.021) is Verdict.NEUTRAL


def test_all_loads_together():
    fast, even = load([100, 101, 100, 101], [110, 111, 110, 111]), load([50, 50, 50, 50], [50, 50, 50, 50])
    ratio, margin, whole = overall([fast, even])
    assert whole is Verdict.FASTER
    assert ratio == pytest.approx(math.sqrt(1.1), abs=1e-3)
    assert margin == LEAST_DIFFERENCE
    slow = load([50, 50, 50, 50], [48, 48, 48, 48])
    assert overall([fast, slow])[2] is Verdict.NEUTRAL
    assert overall([slow, even])[2] is Verdict.SLOWER
    assert overall([]) == (None, None, None)


def test_only_passes_that_every_load_has_count_together():
    whole, half = load([100] * 4, [110] * 4), load([100, 100], [110, 110])
    ratio, _, _ = overall([whole, half])
    assert ratio == pytest.approx(1.1)
    assert overall([whole, load([], [])]) == (None, None, None)


# --- rows ------------------------------------------------------------------------------------------------------------


def duel(own, tuned, batch=64):
    times = [1 + turn / 1e4 for turn in range(9)]
    return Duel(batch, Via.LAYER, tuple(own * t for t in times) if own else (), tuple(tuned * t for t in times))


def test_a_row_that_is_faster():
    row = judged_row([duel(110, 100), duel(110.1, 100), duel(109.9, 100)], same=False)
    assert row.verdict is Verdict.FASTER
    assert row.ratio == pytest.approx(1.1, abs=1e-3)
    assert row.round_ratios == pytest.approx((1.1, 1.101, 1.099), abs=1e-4)
    assert len(row.sglang_us) == len(row.tuned_us) == 27
    assert row.spread < 0.01


def test_rounds_that_disagree_are_noise():
    row = judged_row([duel(103, 100), duel(100, 100), duel(101, 100)], same=False)
    assert row.verdict is Verdict.NEUTRAL
    assert row.margin > 0.02


def test_a_row_that_is_slower_a_row_of_equal_tiles_and_one_without_a_match():
    assert judged_row([duel(100, 103)], same=False).verdict is Verdict.SLOWER
    assert judged_row([duel(103, 100)], same=True).verdict is Verdict.NEUTRAL
    row = judged_row([duel(0, 100)], same=False)
    assert (row.verdict, row.ratio, row.sglang_us, row.round_ratios) == (Verdict.CURED, None, (), ())


def test_all_rows_together():
    fast, even = judged_row([duel(110, 100)], same=False), judged_row([duel(100, 100)], same=False)
    slow, cured = judged_row([duel(95, 100)], same=False), judged_row([duel(0, 100)], same=False)
    ratio, margin, whole = overall_rows([fast, even, cured])
    assert ratio == pytest.approx(math.sqrt(1.1), abs=1e-3)
    assert whole is Verdict.FASTER
    assert margin == pytest.approx(0.003)
    assert overall_rows([fast, slow])[2] is Verdict.NEUTRAL
    assert overall_rows([cured]) == (None, None, Verdict.CURED)
    assert overall_rows([]) == (None, None, None)
