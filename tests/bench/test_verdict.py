"""When a difference counts."""

import math
import random

import pytest

from fixer.bench.passes import Load, Passes
from fixer.bench.results import ServeLoad, Verdict
from fixer.bench.verdict import (
    FEWEST_STARTS,
    LEAST_DIFFERENCE,
    bootstrap,
    compare,
    judged,
    judged_row,
    judged_whole,
    overall_rows,
    student,
    verdict_of,
)
from fixer.tuning.duel import Duel, Via
from tests.support.bench_results import result_of

LOAD = Load(16, 512, 128, 48)
OWN_STARTS, TUNED_STARTS = (0, 3, 4, 7), (1, 2, 5, 6)


def load(own, tuned, passes=1, **more):
    """A load with so many passes on each start; the values are in the order of the starts."""
    sides = [
        Passes(tuple(values), tuple(start for start in starts for _ in range(passes))[: len(values)])
        for values, starts in ((own, OWN_STARTS), (tuned, TUNED_STARTS))
    ]
    return judged(ServeLoad(LOAD, *sides, **more))


def whole(*loads):
    return judged_whole(result_of(*loads))


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
    assert small.verdict is Verdict.NEUTRAL
    assert 1 < small.interval[0] < small.ratio < 1 + LEAST_DIFFERENCE
    assert small.ratio == pytest.approx(1.008, abs=1e-4)
    assert load([100, 112, 100, 112], [106, 118, 106, 118]).verdict is Verdict.NEUTRAL


def test_starts_that_differ_are_what_counts_however_many_passes_agree():
    """Passes of one start that agree with one another to the digit say nothing of the next start."""
    own = [value for value in (100, 104, 100, 104) for _ in range(20)]
    tuned = [value for value in (106, 102.5, 106, 102.5) for _ in range(20)]
    apart = load(own, tuned, 20)
    assert apart.verdict is Verdict.NEUTRAL
    assert apart.interval[0] < 1 < apart.interval[1]
    assert apart.interval == load(own[::20], tuned[::20]).interval


def test_fewer_starts_than_four_decide_nothing():
    for starts in range(1, FEWEST_STARTS):
        few = load([100.0, 100.1, 100.0][:starts], [150.0, 150.1, 150.0][:starts])
        assert few.verdict is Verdict.UNDECIDED
        assert few.ratio == pytest.approx(1.5, abs=1e-3)
        assert (few.interval is None) == (starts == 1)
    assert load([100.0, 100.1, 100.0], [150.0, 150.1, 150.0, 150.1]).verdict is Verdict.UNDECIDED
    assert load([100.0, 100.1, 100.0, 100.1], [150.0, 150.1, 150.0, 150.1]).verdict is Verdict.FASTER


def test_no_verdict_before_each_side_has_a_pass():
    early = load([], [100.0])
    assert early.ratio is early.interval is early.verdict is None
    assert compare([], []) == (None, None, None)


def test_the_ratio_is_the_quotient_of_both_rates():
    """The starts count alike, whatever passes each has; the median of all passes would be another number."""
    uneven = judged(ServeLoad(LOAD, Passes((100.0, 110.0, 90.0), (0, 0, 3)), Passes((120.0, 121.0), (1, 2))))
    assert uneven.sglang.rate == pytest.approx(math.sqrt(math.sqrt(100 * 110) * 90))
    assert uneven.ratio == pytest.approx(uneven.tuned.rate / uneven.sglang.rate, abs=1e-5)
    assert uneven.sglang.rate != pytest.approx(100.0)


def test_both_sides_alike_under_a_load_is_no_effect_of_the_tuning():
    clear = ([100, 101, 100, 101], [110, 111, 110, 111])
    assert load(*clear, same=True).verdict is Verdict.SAME
    assert load(*([values[0]] for values in clear), same=True).verdict is Verdict.SAME
    even = load([50, 50, 50, 50], [50, 50.1, 50, 50.1])
    assert whole(load(*clear, same=True), even).verdict is Verdict.NEUTRAL
    assert whole(load(*clear, same=True), even).ratio == even.ratio
    assert whole(load(*clear, same=True)).verdict is Verdict.SAME
    assert whole(load([], [], same=True)).verdict is None


def test_two_sides_that_are_alike_are_seldom_told_apart():
    """Four starts of each with 1 % of noise and passes with 1 %: the interval errs 6 times in 100, each way counted."""
    chance = random.Random(5)

    def side(shift=0.0):
        return [shift + chance.gauss(0, 0.01) + chance.gauss(0, 0.007) for _ in range(FEWEST_STARTS)]

    wrong = sum(compare(side(), side())[2] is not Verdict.NEUTRAL for _ in range(150)) / 150
    assert wrong < 0.1
    seen = sum(compare(side(), side(0.05))[2] is Verdict.FASTER for _ in range(50)) / 50
    assert seen > 0.9


def test_the_bootstrap_is_over_the_values_and_the_same_each_time():
    own, tuned = [0.0, 0.01, 0.02, 0.03], [0.1, 0.11, 0.12, 0.13]
    low, high = bootstrap(own, tuned)
    assert (low, high) == bootstrap(own, tuned)
    assert low < 0.1 < high
    # Symmetrical, and never beyond what the values can give.
    assert high - 0.1 == pytest.approx(0.1 - low, abs=0.003)
    assert low >= 0.07
    assert high <= 0.13
    assert bootstrap([0.0, 0.0], [0.5, 0.5]) == (0.5, 0.5)


def test_a_verdict_is_the_same_from_either_side():
    assert verdict_of(1.02, (1.001, 1.039)) is Verdict.FASTER
    assert verdict_of(1 / 1.02, (1 / 1.039, 1 / 1.001)) is Verdict.SLOWER
    assert verdict_of(1.02, (0.999, 1.041)) is verdict_of(1 / 1.02, (0.96, 1.001)) is Verdict.NEUTRAL
    assert verdict_of(1.009, (1.008, 1.0095), 0.01) is verdict_of(1 / 1.009, (0.99, 0.992), 0.01) is Verdict.NEUTRAL


def test_all_loads_together():
    fast, even = load([100, 101, 100, 101], [110, 111, 110, 111]), load([50, 50, 50, 50], [50, 50, 50, 50])
    result = whole(fast, even)
    assert result.verdict is Verdict.FASTER
    assert result.ratio == pytest.approx(math.sqrt(1.1), abs=1e-3)
    slow = load([50, 50, 50, 50], [48, 48, 48, 48])
    assert whole(fast, slow).verdict is Verdict.NEUTRAL
    assert whole(slow, even).verdict is Verdict.SLOWER
    assert whole().verdict is whole().ratio is None


def test_only_starts_that_every_load_has_count_together():
    full, half = load([100] * 4, [110] * 4), load([100, 100], [110, 110])
    result = whole(full, half)
    assert result.ratio == pytest.approx(1.1)
    assert result.verdict is Verdict.UNDECIDED
    assert whole(full, load([], [])).verdict is None


def test_what_the_layer_can_give_at_the_most():
    both = whole(load([], [], most=1.1), load([], [], most=1.2), load([], [], same=True, most=1.0))
    assert both.most == pytest.approx(math.sqrt(1.1 * 1.2))
    assert whole(load([], [], most=1.1), load([], [])).most is None


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
    ratio, interval, verdict = overall_rows([fast, even, cured])
    assert ratio == pytest.approx(math.sqrt(1.1), abs=1e-3)
    assert verdict is Verdict.FASTER
    assert interval == pytest.approx((ratio / 1.003, ratio * 1.003), abs=1e-4)
    assert overall_rows([fast, slow])[2] is Verdict.NEUTRAL
    assert overall_rows([cured]) == (None, None, Verdict.CURED)
    assert overall_rows([]) == (None, None, None)
