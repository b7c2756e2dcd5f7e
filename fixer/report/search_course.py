"""How a search went: the best choice known after so many kernels, from the journal's trials in their order."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Outcome
from fixer.workload import Projection

Best = dict[int, dict[Projection, float]]
"""By BLOCK_SIZE_M, which all products share: each product's least time in microseconds."""


@dataclass(frozen=True)
class Course:
    """Attributes:
    tried: kernels tried so far, ascending.
    above: how far the best choice after them is above the final one: geometric mean over the rows, 0.05 is 5 %.
    kernels: all that were tried, and `usable` of them ran and were right.
    """

    tried: tuple[int, ...]
    above: tuple[float, ...]
    kernels: int
    usable: int


def course_of(looks: Sequence[Look], rows: Iterable[int], products: Sequence[Projection]) -> Course | None:
    """The course of a search over these rows; None where some row never had all products timed."""
    best: dict[int, Best] = {tokens: defaultdict(dict) for tokens in rows}
    totals: list[tuple[int, tuple[float, ...]]] = []
    for count, look in enumerate(looks, start=1):
        kernel = look.build.kernel
        for timing in look.timings:
            if timing.tokens in best:
                of_height = best[timing.tokens][kernel.tile.block_m]
                known = of_height.get(kernel.projection, timing.microseconds)
                of_height[kernel.projection] = min(known, timing.microseconds)
        sums = tuple(_least(one, len(products)) for one in best.values())
        if None not in sums:
            totals.append((count, tuple(value for value in sums if value is not None)))
    if not totals or not best:
        return None
    final = totals[-1][1]
    above = tuple(
        statistics.geometric_mean(now / last for now, last in zip(values, final, strict=True)) - 1
        for _, values in totals
    )
    usable = sum(look.build.outcome is Outcome.OK for look in looks)
    return Course(tuple(count for count, _ in totals), above, len(looks), usable)


def _least(best: Best, products: int) -> float | None:
    whole = [sum(times.values()) for times in best.values() if len(times) == products]
    return min(whole, default=None)
