"""The last word on each row: the search's winner against what SGLang would have run without moefix.

Both are timed in turn, on the same data, through SGLang's own layer where it can be imported. A winner that does not
win by more than the measured noise gives way to SGLang's own configuration: a row of ours is never slower.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fixer.base.errors import TuneError
from fixer.workload import Kernel, RowTiles

LEAST_GAIN = 0.003
"""A gain below this fraction is not worth leaving SGLang's own configuration for (run-to-run spread: 0.1-0.3 %)."""

CONFIDENCE = 3.0
"""Standard errors by which a gain must clear zero."""


@dataclass(frozen=True)
class DuelRequest:
    """Time two pairs in turn for one row; `own` is None where SGLang's own cannot run."""

    tokens: int
    own: RowTiles | None
    tuned: RowTiles

    @property
    def pairs(self) -> tuple[RowTiles, ...]:
        """Both sides, SGLang's own first; one where there is no other."""
        return (self.tuned,) if self.own is None else (self.own, self.tuned)


class PairError(TuneError):
    """One pair failed in SGLang's own layer: it could not run, or its numbers are wrong.

    Args:
        pair: which; None where it cannot be said.
        message: the error.
    """

    def __init__(self, pair: RowTiles | None, message: str) -> None:
        super().__init__(message)
        self.pair = pair

    def __reduce__(self) -> tuple[type[PairError], tuple[RowTiles | None, str]]:
        return PairError, (self.pair, self.message)  # it comes through a pipe


class Via(Enum):
    """What was timed."""

    LAYER = "SGLang's layer"
    KERNELS = "the two kernels"


@dataclass(frozen=True)
class Duel:
    """Two pairs timed in turn for one row, in microseconds a forward; the i-th times belong together.

    Attributes:
        tokens: the row's M.
        via: what was timed.
        own: SGLang's own pair's times; empty where it cannot run on this card.
        tuned: the winner's times.
    """

    tokens: int
    via: Via
    own: tuple[float, ...]
    tuned: tuple[float, ...]

    @property
    def gain(self) -> float:
        """By which fraction SGLang's own takes longer: 0.05 is 5 %; 0 where it was not timed."""
        return statistics.median(self.own) / statistics.median(self.tuned) - 1 if self.own else 0.0

    @property
    def noise(self) -> float:
        """The standard error of the gain: both medians' relative errors together; 0 where there is no gain."""
        return math.hypot(_relative_error(self.own), _relative_error(self.tuned)) if self.own else 0.0

    def joined(self, other: Duel) -> Duel:
        """Both duels' times together."""
        return Duel(self.tokens, self.via, self.own + other.own, self.tuned + other.tuned)

    @property
    def is_open(self) -> bool:
        """Whether there is a gain that does not clear the noise yet: more rounds would decide."""
        return bool(self.own) and self.gain >= LEAST_GAIN and not self.is_won

    @property
    def is_won(self) -> bool:
        """Whether the gain clears the noise, or SGLang's own cannot run at all."""
        return not self.own or self.gain > max(LEAST_GAIN, CONFIDENCE * self.noise)


def _relative_error(times: Sequence[float]) -> float:
    """The standard error of a median as a fraction of it, from the median absolute deviation, which outliers spare."""
    if len(times) < 3:
        return math.inf
    median = statistics.median(times)
    deviation = 1.4826 * statistics.median(abs(time - median) for time in times)
    return 1.2533 * deviation / math.sqrt(len(times)) / median


@dataclass(frozen=True)
class KernelDuel:
    """A duel kernel by kernel, with each kernel's median in microseconds a launch."""

    duel: Duel
    medians: Mapping[Kernel, float]


def rounds_for(microseconds: float, budget_seconds: float = 0.12) -> int:
    """How many rounds of a duel fit a row's budget, from 7 to 25.

    Args:
        microseconds: one replay of both sides' graphs together.
    """
    return max(7, min(25, int(budget_seconds * 1e6 / max(microseconds, 1.0))))
