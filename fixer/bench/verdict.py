"""Whether a difference is more than the measurement's own variation, for servers under load and for kernel rows.

All of it works on logarithms of ratios, so that neither side is the measure of the other.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from fixer.bench.passes import Interval, Passes
from fixer.bench.results import BenchResult, KernelRow, ServeLoad, Side, Verdict
from fixer.tuning.duel import CONFIDENCE, LEAST_GAIN, Duel

FEWEST_STARTS = 4
"""A side that was started less often is not judged. With three starts a side, all of one side come out above all of the
other in 1 of 10 comparisons of equal servers; with four, in 1 of 35."""

LEAST_DIFFERENCE = 0.01
"""Two servers' throughput differs by at least this fraction, or the verdict is neutral."""

RESAMPLES = 4000
"""Samples that the bootstrap draws; with them it takes 25 milliseconds."""

_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t, two-sided 95 %, for 1 to 20 degrees of freedom; what follows differs little from the last."""


def student(freedom: int) -> float:
    """How many standard errors a mean may be off, 95 times in 100."""
    return _STUDENT[min(freedom, len(_STUDENT)) - 1]


# --- servers ---------------------------------------------------------------------------------------------------------


def judged(load: ServeLoad) -> ServeLoad:
    """The load with the ratio, the interval and the verdict that its passes come to."""
    own, tuned = (list(load.side(side).by_start.values()) for side in Side)
    ratio, interval, verdict = compare(own, tuned)
    if verdict is not None and load.same:
        verdict = Verdict.SAME
    return replace(load, ratio=ratio, interval=interval, verdict=verdict)


def judged_whole(result: BenchResult) -> BenchResult:
    """A result of servers with the ratio, the interval and the verdict of all loads together.

    Loads under which both sides run the same kernels are left out. Faster as a whole but slower under one of the loads
    (or the other way round) is neutral.
    """
    loads = [load for load in result.serve if not load.same]
    if not loads:
        every = bool(result.serve) and all(load.verdict for load in result.serve)
        return replace(result, ratio=None, interval=None, verdict=Verdict.SAME if every else None)
    own, tuned = (_scores([load.side(side) for load in loads]) for side in Side)
    ratio, interval, verdict = compare(own, tuned)
    if verdict is not None:
        verdict = _all_in_all(verdict, {load.verdict for load in loads})
    return replace(result, ratio=ratio, interval=interval, verdict=verdict)


def compare(own: Sequence[float], tuned: Sequence[float]) -> tuple[float | None, Interval | None, Verdict | None]:
    """The ratio of the tuned side to SGLang's own, its interval, and what they say.

    Args:
        own, tuned: one number for each start: the mean logarithm of its passes' throughput.

    Returns:
        None three times while a side has no start; no interval while one has a single start.
    """
    if not own or not tuned:
        return None, None, None
    ratio = math.exp(statistics.fmean(tuned) - statistics.fmean(own))
    if min(len(own), len(tuned)) < 2:
        return round(ratio, 5), None, Verdict.UNDECIDED
    low, high = bootstrap(own, tuned)
    interval = round(math.exp(low), 5), round(math.exp(high), 5)
    if min(len(own), len(tuned)) < FEWEST_STARTS:
        return round(ratio, 5), interval, Verdict.UNDECIDED
    return round(ratio, 5), interval, verdict_of(ratio, interval, LEAST_DIFFERENCE)


def verdict_of(ratio: float, interval: Interval, least: float = 0.0) -> Verdict:
    """A ratio counts where its interval does not hold 1, and it differs from 1 by at least that fraction."""
    if interval[0] <= 1 <= interval[1] or abs(math.log(ratio)) < math.log1p(least):
        return Verdict.NEUTRAL
    return Verdict.FASTER if ratio > 1 else Verdict.SLOWER


def bootstrap(own: Sequence[float], tuned: Sequence[float]) -> Interval:
    """The bounds, 95 times in 100, of the difference of two means, by a bootstrap over each side's values.

    The percentiles are wider than 2.5 and 97.5, since few values spread less than what they are drawn from: the
    expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3). With
    four values a side it leaves out the truth 6 times in 100 (3000 trials), where the plain one does 14 times.
    """
    fewest = min(len(own), len(tuned))
    width = math.sqrt(fewest / (fewest - 1)) * student(len(own) + len(tuned) - 2)
    place = int(RESAMPLES * statistics.NormalDist().cdf(-width))
    chance = random.Random(len(own) + len(tuned))  # noqa: S311 (the same for the same values, and no secret)
    samples = [
        sum(chance.choices(tuned, k=len(tuned))) / len(tuned) - sum(chance.choices(own, k=len(own))) / len(own)
        for _ in range(RESAMPLES)
    ]
    samples.sort()
    return samples[place], samples[-1 - place]


def _all_in_all(whole: Verdict, parts: set[Verdict | None]) -> Verdict:
    opposite = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER}
    return Verdict.NEUTRAL if opposite.get(whole) in parts else whole


def _scores(loads: Sequence[Passes]) -> list[float]:
    """The mean over the loads of each start that every load has."""
    by_load = [passes.by_start for passes in loads]
    starts = set.intersection(*(set(starts) for starts in by_load))
    return [statistics.fmean(starts[start] for starts in by_load) for start in sorted(starts)]


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
    verdict = Verdict.CURED if ratio is None else verdict_of(ratio, _around(ratio, margin))
    if same and ratio is not None:
        verdict = Verdict.NEUTRAL
    return KernelRow(
        batch=batch,
        sglang_us=_rounded(own, 3),
        tuned_us=_rounded(tuned, 3),
        same=same,
        ratio=None if ratio is None else round(ratio, 5),
        round_ratios=_rounded(ratios, 5),
        spread=round(max(_middle_half(times) for times in (own, tuned) if times), 5),
        margin=round(margin, 5),
        verdict=verdict,
    )


def overall_rows(rows: Sequence[KernelRow]) -> tuple[float | None, Interval | None, Verdict | None]:
    """Ratio, interval and verdict of all rows together, by the geometric mean of those that could be compared."""
    compared = [row for row in rows if row.ratio is not None]
    if not compared:
        return None, None, Verdict.CURED if rows else None
    ratio = statistics.geometric_mean(row.ratio or 1.0 for row in compared)
    width = math.sqrt(sum(math.log1p(row.margin) ** 2 for row in compared)) / len(compared)
    margin = max(LEAST_GAIN, math.expm1(width))
    whole = _all_in_all(verdict_of(ratio, _around(ratio, margin)), {row.verdict for row in rows})
    return round(ratio, 5), _around(ratio, margin), whole


def _around(ratio: float, margin: float) -> Interval:
    return round(ratio / (1 + margin), 5), round(ratio * (1 + margin), 5)


def _rounded(values: Sequence[float], digits: int) -> tuple[float, ...]:
    return tuple(round(value, digits) for value in values)


def _middle_half(times: Sequence[float]) -> float:
    """The distance between the quartiles as a fraction of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
