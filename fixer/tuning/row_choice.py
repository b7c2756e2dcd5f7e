"""A row's choice: the search's pairs against what SGLang would have run, with everything that can fail on the way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from fixer.artefacts.artefact import Decision, RowChoice, Times
from fixer.base.errors import TuneError
from fixer.tuning.comparison import LayerComparisons
from fixer.tuning.duel import LEAST_GAIN, Duel, DuelRequest, KernelDuel, Via
from fixer.tuning.search.search import Pair, Search
from fixer.workload import Kernel, RowTiles

MOST_ALTERNATIVES = 3
"""How many pairs of a row are tried, one after the other's failure."""


class KernelComparisons(Protocol):
    """Compares pairs by their bare kernels, where SGLang's layer is not there."""

    def duel(self, request: DuelRequest) -> KernelDuel | None:
        """Times of both pairs; None where a kernel fails."""
        ...


class Finals:
    """Decides rows one by one; what fails in one row decides nothing in another.

    Args:
        own: SGLang's own pair of each row.
        search: what was measured of single kernels.
        kernels: times bare kernels.
        layer: SGLang's own layer, None where it cannot be used here. Then the kernels decide.
        note: called with every line that a user should read.
    """

    def __init__(
        self,
        own: Mapping[int, RowTiles],
        search: Search,
        kernels: KernelComparisons,
        layer: LayerComparisons | None,
        note: Callable[[str], None],
    ) -> None:
        self._own = own
        self._search = search
        self._kernels = kernels
        self._layer = layer
        self._note = note

    def row(self, tokens: int, *, own_runs: bool) -> RowChoice:
        """The choice for one row.

        Args:
            own_runs: False where SGLang's own is known not to fit this card.

        Raises:
            TuneError: nothing runs, SGLang's own neither.
        """
        own, medians = self._own[tokens], self._search.medians(tokens)
        for tuned in alternatives(self._search, tokens)[:MOST_ALTERNATIVES]:
            request = DuelRequest(tokens, own if own_runs and own != tuned else None, tuned)
            if not self._has_layer:
                kernels = self._kernel_duel(request)
                if kernels is not None:
                    return row_choice(request, own, kernels.duel, kernels.medians)
                self._note(f"M={tokens}: the finals could not time {tuned}")
                continue
            assert self._layer is not None
            settled = self._layer.settle(request)
            if not self._has_layer:  # it could not be started
                return self.row(tokens, own_runs=own_runs)
            own_runs = own_runs and own not in settled.faults
            if settled.duel is not None:
                request = request if own_runs else replace(request, own=None)
                return row_choice(*self._against_descriptors(request, own, settled.duel), medians)
            if tuned not in settled.faults or own in settled.faults:
                break  # the two do not run in turn, or none runs: another pair would not mend that
        if not own_runs and not self._has_layer:
            raise TuneError(f"The finals could not time M={tokens}.", "Run `moefix tune` again: it goes on from here.")
        self._note(f"M={tokens}: SGLang's own configuration stays: nothing could be compared with it")
        return RowChoice(tokens, own, Decision.FITTING_ONLY)

    @property
    def _has_layer(self) -> bool:
        return self._layer is not None and not self._layer.why_missing

    def _kernel_duel(self, request: DuelRequest) -> KernelDuel | None:
        own = None if request.own is None or request.own.use_tma else request.own
        return self._kernels.duel(replace(request, own=own))

    def _against_descriptors(
        self, request: DuelRequest, own: RowTiles, duel: Duel
    ) -> tuple[DuelRequest, RowTiles, Duel]:
        """The comparison with the best pair that loads through tensor descriptors in the winner's place, if it wins.

        A kernel that is faster by itself may cost the layer more: rows are then padded and sorted in between.
        """
        rival = described_pair(self._search, request.tokens)
        if rival is None or self._layer is None:
            return request, own, duel
        keeps = request.own is not None and not duel.is_won
        winner, times = (own, duel.own) if keeps else (request.tuned, duel.tuned)
        settled = self._layer.settle(DuelRequest(request.tokens, winner, rival))
        if settled.duel is None or not settled.duel.own or not settled.duel.is_won:
            return request, own, duel
        ratio = statistics.median(times) / statistics.median(settled.duel.own)
        tuned = tuple(time * ratio for time in settled.duel.tuned)
        owns_times = duel.tuned if request.tuned == own else duel.own
        both = Duel(request.tokens, Via.LAYER, owns_times, tuned)
        if not both.is_won:
            return request, own, duel
        return DuelRequest(request.tokens, own if owns_times else None, rival), own, both


def alternatives(search: Search, tokens: int) -> list[RowTiles]:
    """The best plain pair of each BLOCK_SIZE_M, the fastest first."""
    return [_tiles(pair) for pair in search.best_pairs(tokens, plain=True)]


def described_pair(search: Search, tokens: int) -> RowTiles | None:
    """The best pair that loads through tensor descriptors; None where it is not faster than the best plain one."""
    pairs, plain = search.best_pairs(tokens), search.best_pairs(tokens, plain=True)
    if not pairs or not plain or pairs[0].microseconds * (1 + LEAST_GAIN) >= plain[0].microseconds:
        return None
    return _tiles(pairs[0])


def _tiles(pair: Pair) -> RowTiles:
    return pair.row


def row_choice(request: DuelRequest, sglang_own: RowTiles, duel: Duel, medians: Mapping[Kernel, float]) -> RowChoice:
    """A row's verdict from its comparison.

    Args:
        request: what was timed; its `own` is None where SGLang's own is the winner itself, or does not run.
        sglang_own: SGLang's own pair, timed or not.
        duel: through SGLang's layer, or of the bare kernels where there is no layer.
        medians: single kernels' times in microseconds, as far as they are known.
    """
    layer = duel if duel.via is Via.LAYER else None
    same = request.tuned == sglang_own
    unjudged = request.own is not None and not duel.own  # a TMA file, and no layer to time it through
    keeps = same or unjudged or (request.own is not None and not duel.is_won)
    pair = sglang_own if keeps else request.tuned

    def medians_of(pair: RowTiles) -> Times:
        return tuple(medians.get(kernel) for kernel in pair.kernels)

    layer_us = statistics.median(layer.tuned) if layer else None
    own_layer_us = statistics.median(layer.own) if layer and layer.own else (layer_us if same else None)
    us, sglang_us = medians_of(pair), medians_of(sglang_own)
    layer_times = (own_layer_us if keeps else layer_us, own_layer_us)
    decision = Decision.KEPT_SGLANG if keeps else Decision.TUNED
    if None in us + sglang_us and None in layer_times:
        decision = Decision.FITTING_ONLY
    if request.own is None and not same:  # SGLang's own does not run, whatever its kernels took by themselves
        decision, sglang_us, layer_times = Decision.FITTING_ONLY, (), (layer_times[0], None)
    noise = duel.noise if duel.own and duel.noise < 1000 else None
    return RowChoice(request.tokens, pair, decision, us, sglang_us, noise, *layer_times)
