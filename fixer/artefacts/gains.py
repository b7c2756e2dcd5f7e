"""What an artefact gains over SGLang's own, row by row and on average."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from fixer.artefacts.artefact import Artefact, RowChoice


def covers(artefact: Artefact, rows: Sequence[int]) -> bool:
    """Whether an artefact has every row that a server needs."""
    return set(rows) <= {row.batch for row in artefact.rows}


def geometric_gain(artefact: Artefact, within: Callable[[int], bool] = lambda _: True) -> float | None:
    """By which factor the artefact's rows are faster than SGLang's own, None where nothing was compared."""
    ratios = []
    for row in artefact.rows:
        compared = compared_times(row)
        if compared is not None and within(row.batch):
            own, ours = compared
            ratios.append(own / ours)
    return statistics.geometric_mean(ratios) if ratios else None


def compared_times(row: RowChoice) -> tuple[float, float] | None:
    """SGLang's own time of a row and ours, in microseconds: the layer's, else all kernels'; None where one lacks."""
    if row.sglang_layer_us is not None and row.layer_us is not None:
        return row.sglang_layer_us, row.layer_us
    ours = [time for time in row.us if time is not None]
    own = [time for time in row.sglang_us if time is not None]
    return (sum(own), sum(ours)) if len(ours) + len(own) == len(row.times) else None
