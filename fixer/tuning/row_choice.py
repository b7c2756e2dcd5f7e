"""The choice for one row: the tuned pair, or SGLang's own."""

from __future__ import annotations

import statistics

from fixer.artefacts.artefact import Decision, RowChoice
from fixer.base.errors import TuneError
from fixer.tuning.duel import Duel, DuelRequest, KernelDuel
from fixer.workload import TilePair


def row_choice(request: DuelRequest, sglang_own: TilePair, layer: Duel | None, kernels: KernelDuel | None) -> RowChoice:
    """A row's verdict from its duels.

    Args:
        request: what was timed; its `own` is None where SGLang's own is the winner itself, or does not run.
        sglang_own: SGLang's own pair, timed or not.
        layer: the duel through SGLang's layer, None where there was none: then the kernels' duel decides.
        kernels: the duel of the bare kernels, for the single kernels' times.

    Raises:
        TuneError: nothing was timed.
    """
    judge = layer or (kernels.duel if kernels else None)
    if judge is None:
        raise TuneError(f"The finals could not time M={request.tokens}.")
    same = request.tuned == sglang_own
    unjudged = request.own is not None and not judge.own  # a TMA file, and no layer to time it through
    keeps = same or unjudged or (request.own is not None and not judge.is_won)
    pair = sglang_own if keeps else request.tuned
    medians = kernels.medians if kernels else {}

    def median_of(pair: TilePair, projection: int) -> float | None:
        return medians.get(pair.kernels[projection])

    layer_us = statistics.median(layer.tuned) if layer else None
    own_layer_us = statistics.median(layer.own) if layer and layer.own else (layer_us if same else None)
    times = (median_of(pair, 0), median_of(pair, 1), median_of(sglang_own, 0), median_of(sglang_own, 1))
    layer_times = (own_layer_us if keeps else layer_us, own_layer_us)
    decision = Decision.KEPT_SGLANG if keeps else Decision.TUNED
    if None in times and None in layer_times:
        decision = Decision.FITTING_ONLY
    noise = judge.noise if judge.own and judge.noise < 1000 else None
    return RowChoice(request.tokens, pair.gate_up, pair.down, decision, *times, noise, *layer_times)
