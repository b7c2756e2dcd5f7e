"""What a step in the space is expected to bring, from what it brought elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fixer.kernel.space import distance
from fixer.workload import Tile


@dataclass(frozen=True)
class Prediction:
    """What a time is thought to be: mean and standard deviation of its natural logarithm (of microseconds)."""

    mean: float
    deviation: float

    def expected_gain(self, target: float) -> float:
        """Expected improvement below a target time in microseconds, as a fraction of the target."""
        z = (math.log(target) - self.mean) / self.deviation
        if z < -4:
            return 0.0
        below = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        return self.deviation * (z * below + math.exp(-z * z / 2) / math.sqrt(2 * math.pi))


PRIORS: Mapping[str, Prediction] = {
    "block_m": Prediction(0.10, 0.10),
    "block_n": Prediction(0.05, 0.07),
    "block_k": Prediction(0.05, 0.06),
    "group_m": Prediction(0.003, 0.010),
    "num_warps": Prediction(0.03, 0.05),
    "num_stages": Prediction(0.015, 0.040),
    "use_tma": Prediction(0.0, 0.06),
}
"""What a step away from a good tile does to the logarithm of its time, before anything is known: the medians and
spreads in the H100 landscape within 3 % of each row's best, rounded. (Tensor descriptors are in no landscape yet:
reports say -28 to +10 %.)"""


CROWDED_GROUP = Prediction(0.005, 0.020)
"""GROUP_SIZE_M where an expert fills several blocks: only then does the order of blocks decide what L2 holds."""


SMALLEST_DEVIATION = 0.004
"""No prediction is surer than two runs of one kernel agree (0.1 to 0.3 %), and a little more."""


def effect_of(prior: Prediction, tile: Tile, seen: Iterable[tuple[Tile, float]]) -> Prediction:
    """What a step from a tile brings: the prior, and what it brought elsewhere, half as much a unit of distance."""
    weight, total = 1.0, prior.mean
    for other, change in seen:
        nearness = 0.5 ** distance(other, tile)
        weight += nearness
        total += nearness * change
    return Prediction(total / weight, prior.deviation / math.sqrt(weight))


def together(predictions: Sequence[Prediction]) -> Prediction:
    """Several predictions of one time, the surer the weightier (they are not independent: one's deviation stays)."""
    weights = [prediction.deviation**-2 for prediction in predictions]
    mean = sum(weight * prediction.mean for weight, prediction in zip(weights, predictions, strict=True)) / sum(weights)
    surest = min(prediction.deviation for prediction in predictions)
    return Prediction(mean, max(0.8 * surest, SMALLEST_DEVIATION))
