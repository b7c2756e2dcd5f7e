"""Whether a difference is more than the measurement's own variation, for servers under load and for kernel rows.

All of it works on logarithms of ratios, so that neither side is the measure of the other.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fixer.bench_results import Arm, Arms, KernelRow, ServeLoad, Verdict
from fixer.tuning.duel import CONFIDENCE, LEAST_GAIN, Duel

LEAST_DIFFERENCE = 0.01
"""Two servers' throughput differs by at least this fraction, or the verdict is neutral."""

LEAST_DIFFERENCE_OF_ONE_START = 0.02
"""The same where a side was started only once: how starts differ among themselves is then not known."""

_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t, two-sided 95 %, for 1 to 20 degrees of freedom; what follows differs little from the last."""


def student(freedom: int) -> float:
    """How many standard errors a mean may be off, 95 times in 100."""
    return _STUDENT[min(freedom, len(_STUDENT)) - 1]


# --- servers ---------------------------------------------------------------------------------------------------------

Passes = Mapping[int, Sequence[float]]
"""Logarithms of each pass's throughput, by the start of the server that it ran on."""


def judged(load: ServeLoad) -> ServeLoad:
    """The load with its ratio, spread, margin and verdict; without them until each side has two passes."""
    own, tuned = _passes(load.arms.sglang), _passes(load.arms.tuned)
    ratio, margin = compare(own, tuned)
    if ratio is None or margin is None:
        return ServeLoad(load.load, load.arms, ratio)
    spread = max(max(arm.output_tokens_per_s) / min(arm.output_tokens_per_s) - 1 for arm in _both(load.arms))
    return ServeLoad(load.load, load.arms, round(ratio, 5), round(spread, 5), round(margin, 5), verdict(ratio, margin))


def overall(loads: Sequence[ServeLoad]) -> tuple[float | None, float | None, Verdict | None]:
    """Ratio, margin and verdict of all loads together: each pass over all loads counts by its geometric mean.

    Faster as a whole but slower under one of the loads (or the other way round) is neutral.
    """
    ratio, margin = compare(_scores([load.arms.sglang for load in loads]), _scores([load.arms.tuned for load in loads]))
    if ratio is None or margin is None:
        return ratio, None, None
    return round(ratio, 5), round(margin, 5), _all_in_all(verdict(ratio, margin), {load.verdict for load in loads})


def compare(own: Passes, tuned: Passes) -> tuple[float | None, float | None]:
    """The ratio of the tuned side to SGLang's own, and the fraction by which it has to differ from 1 to count.

    The margin is the largest of: the 95 % interval with every pass as a sample; the same with every start as one, where
    both sides were started twice; the least difference worth a verdict.

    Returns:
        Neither while a side has no pass; no margin while one has a single pass.
    """
    if not own or not tuned:
        return None, None
    log_ratio = _mean(_flat(tuned)) - _mean(_flat(own))
    ratio = math.exp(log_ratio)
    if min(len(_flat(own)), len(_flat(tuned))) < 2:
        return ratio, None
    margins = [_interval(_flat(own), _flat(tuned))]
    least = LEAST_DIFFERENCE_OF_ONE_START
    if min(len(own), len(tuned)) >= 2:
        margins.append(_interval(*([_mean(passes) for passes in side.values()] for side in (own, tuned))))
        least = LEAST_DIFFERENCE
    return ratio, max(least, *(math.expm1(margin) for margin in margins))


def verdict(ratio: float, margin: float) -> Verdict:
    """A ratio counts where it is further from 1 than the margin, as a factor either way."""
    if abs(math.log(ratio)) <= math.log1p(margin):
        return Verdict.NEUTRAL
    return Verdict.FASTER if ratio > 1 else Verdict.SLOWER


def _all_in_all(whole: Verdict, parts: set[Verdict | None]) -> Verdict:
    opposite = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER}
    return Verdict.NEUTRAL if opposite.get(whole) in parts else whole


def _both(arms: Arms) -> tuple[Arm, Arm]:
    return arms.sglang, arms.tuned


def _passes(arm: Arm) -> Passes:
    by_start: dict[int, list[float]] = defaultdict(list)
    for start, value in zip(arm.starts, arm.output_tokens_per_s, strict=True):
        by_start[start].append(math.log(value))
    return by_start


def _scores(arms: Sequence[Arm]) -> Passes:
    """The mean over the loads of each pass that every load has."""
    sides = [_passes(arm) for arm in arms]
    scores = {}
    for start in sides[0] if sides else ():
        columns = [side.get(start, ()) for side in sides]
        passes = [_mean(values) for values in zip(*columns, strict=False)]
        if passes:
            scores[start] = passes
    return scores


def _flat(passes: Passes) -> list[float]:
    return [value for values in passes.values() for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(one: Sequence[float], other: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the difference of two means, with a common variance."""
    freedom = len(one) + len(other) - 2
    squares = sum((value - _mean(side)) ** 2 for side in (one, other) for value in side)
    return student(freedom) * math.sqrt(squares / freedom * (1 / len(one) + 1 / len(other)))


# --- kernel rows -----------------------------------------------------------------------------------------------------


def judged_row(rounds: Sequence[Duel], *, same: bool) -> KernelRow:
    """A row from its duels, one a round.

    The margin is the largest of the finals' own (three standard errors, 0.3 %) and the 95 % interval over the rounds.
    """
    own = tuple(time for duel in rounds for time in duel.own)
    tuned = tuple(time for duel in rounds for time in duel.tuned)
    batch, whole = rounds[0].tokens, Duel(rounds[0].tokens, rounds[0].via, own, tuned)
    ratios = [statistics.median(duel.own) / statistics.median(duel.tuned) for duel in rounds if duel.own]
    margins = [LEAST_GAIN, CONFIDENCE * whole.noise]
    if len(ratios) > 1:
        logs = [math.log(ratio) for ratio in ratios]
        margins.append(math.expm1(student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))))
    margin, ratio = max(margins), 1 + whole.gain if own else None
    return KernelRow(
        batch=batch,
        sglang_us=_rounded(own, 3),
        tuned_us=_rounded(tuned, 3),
        same=same,
        ratio=None if ratio is None else round(ratio, 5),
        round_ratios=_rounded(ratios, 5),
        spread=round(max(_middle_half(times) for times in (own, tuned) if times), 5),
        margin=round(margin, 5),
        verdict=Verdict.CURED if ratio is None else Verdict.NEUTRAL if same else verdict(ratio, margin),
    )


def overall_rows(rows: Sequence[KernelRow]) -> tuple[float | None, float | None, Verdict | None]:
    """Ratio, margin and verdict of all rows together, by the geometric mean of those that could be compared."""
    compared = [row for row in rows if row.ratio is not None]
    if not compared:
        return None, None, Verdict.CURED if rows else None
    ratio = statistics.geometric_mean(row.ratio or 1.0 for row in compared)
    width = math.sqrt(sum(math.log1p(row.margin) ** 2 for row in compared)) / len(compared)
    margin = max(LEAST_GAIN, math.expm1(width))
    whole = _all_in_all(verdict(ratio, margin), {row.verdict for row in rows})
    return round(ratio, 5), round(margin, 5), whole


def _rounded(values: Sequence[float], digits: int) -> tuple[float, ...]:
    return tuple(round(value, digits) for value in values)


def _middle_half(times: Sequence[float]) -> float:
    """The distance between the quartiles as a fraction of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
