"""Rows decided one by one, with a layer and kernels that answer as told."""

from __future__ import annotations

import pytest

from fixer.artefacts.artefact import Decision
from fixer.base.errors import TuneError
from fixer.tuning.comparison import Settled
from fixer.tuning.duel import Duel, DuelRequest, KernelDuel, Via
from fixer.tuning.row_choice import Finals, described_pair
from fixer.tuning.search.search import Search
from fixer.tuning.search.trials import Timing
from fixer.workload import Kernel, Projection, RowTiles, Tile, Workload

UP, DOWN = Projection.GATE_UP, Projection.DOWN
LOW, TALL, TMA = Tile(16, 64, 64, 1), Tile(64, 64, 64, 1), Tile(16, 64, 64, 1, use_tma=True)
FIRST, SECOND, DESCRIBED = RowTiles(LOW, LOW), RowTiles(TALL, TALL), RowTiles(LOW, TMA)
OWN = RowTiles(Tile(32, 32, 64, 8), Tile(32, 32, 64, 8))
M = 1024


def search(*, tma: float | None = None) -> Search:
    """FIRST is the best plain pair, SECOND the next; with `tma` the down kernel has a descriptor form of that time."""
    made = Search(Workload(8, 64, 128, 2), (M,), (), descriptors=frozenset({DOWN}))
    times = [(UP, LOW, 10.0), (DOWN, LOW, 8.0), (UP, TALL, 11.0), (DOWN, TALL, 9.0)]
    for projection, tile, us in times + ([(DOWN, TMA, tma)] if tma else []):
        made.timed(Timing(Kernel(projection, tile), M, us, us, 3))
    return made


def duel(own: float | None, tuned: float) -> Duel:
    steady = [1 + step / 10_000 for step in (-3, -2, -1, 0, 1, 2, 3)]
    return Duel(M, Via.LAYER, tuple(own * s for s in steady) if own else (), tuple(tuned * s for s in steady))


class Layer:
    """Microseconds by pair; a text is an error."""

    why_missing = ""

    def __init__(self, times) -> None:
        self.times, self.asked = times, []

    def settle(self, request: DuelRequest) -> Settled:
        self.asked.append(request.pairs)
        found = {pair: self.times[pair] for pair in request.pairs}
        faults = {pair: time for pair, time in found.items() if isinstance(time, str)}
        if not faults:
            return Settled(duel(found[request.own] if request.own else None, found[request.tuned]))
        if request.tuned not in faults:
            return Settled(duel(None, found[request.tuned]), faults)
        return Settled(None, faults)


class Kernels:
    def __init__(self, answer=None) -> None:
        self.answer, self.asked = answer, []

    def duel(self, request: DuelRequest) -> KernelDuel | None:
        self.asked.append(request)
        return self.answer


def row(layer, kernels=None, made=None, own_runs=True):
    notes: list[str] = []
    finals = Finals({M: OWN}, made or search(), kernels or Kernels(), layer, notes.append)
    return finals.row(M, own_runs=own_runs), notes


def test_the_best_pair_wins_through_the_layer():
    layer = Layer({OWN: 100.0, FIRST: 80.0})
    choice, notes = row(layer)
    assert (choice.gate_up, choice.down, choice.decision) == (LOW, LOW, Decision.TUNED)
    assert choice.layer_times == pytest.approx((80, 100))
    assert choice.times == (10.0, 8.0, None, None)  # as the search timed them
    assert (layer.asked, notes) == ([(OWN, FIRST)], [])


def test_a_pair_at_fault_gives_way_to_the_next():
    choice, _ = row(Layer({OWN: 100.0, FIRST: "relative error 0.5", SECOND: 90.0}))
    assert (choice.gate_up, choice.decision) == (TALL, Decision.TUNED)


def test_nothing_that_failed_in_the_layer_is_installed_though_its_kernels_run():
    kernels = Kernels(KernelDuel(duel(100, 50), {}))
    choice, notes = row(Layer({OWN: 100.0, FIRST: "crashed", SECOND: "crashed"}), kernels)
    assert (choice.gate_up, choice.decision) == (OWN.gate_up, Decision.FITTING_ONLY)
    assert kernels.asked == []
    assert notes == [f"M={M}: SGLang's own configuration stays: nothing could be compared with it"]


def test_sglangs_own_at_fault_is_cured():
    choice, _ = row(Layer({OWN: "out of resource: shared memory", FIRST: 80.0}))
    assert (choice.gate_up, choice.decision) == (LOW, Decision.FITTING_ONLY)
    assert choice.layer_times == pytest.approx((80, None), nan_ok=True)


def test_a_layer_that_fails_with_both_keeps_sglangs_own_and_tries_no_further():
    layer = Layer({OWN: "trap", FIRST: "trap", SECOND: 90.0})
    choice, notes = row(layer)
    assert (choice.gate_up, choice.decision) == (OWN.gate_up, Decision.FITTING_ONLY)
    assert layer.asked == [(OWN, FIRST)]
    assert len(notes) == 1


def test_two_that_do_not_run_in_turn_keep_sglangs_own():
    class Together(Layer):
        def settle(self, request):
            return Settled()

    choice, _ = row(Together({}))
    assert (choice.gate_up, choice.decision) == (OWN.gate_up, Decision.FITTING_ONLY)


def test_without_a_layer_the_kernels_decide():
    class Missing(Layer):
        def settle(self, request):
            self.why_missing = "no module"
            return Settled()

    answer = KernelDuel(Duel(M, Via.KERNELS, *[duel(100, 80).own, duel(100, 80).tuned]), {})
    for layer in (None, Missing({})):
        choice, _ = row(layer, Kernels(answer))
        assert (choice.gate_up, choice.decision) == (LOW, Decision.FITTING_ONLY)  # no kernel was timed for the record
    with pytest.raises(TuneError, match="could not time M=1024"):
        row(None, Kernels(None), own_runs=False)


# --- tensor descriptors


def test_descriptors_are_compared_with_the_winner_in_the_layer():
    layer = Layer({OWN: 100.0, FIRST: 80.0, DESCRIBED: 60.0})
    choice, _ = row(layer, made=search(tma=6.0))
    assert layer.asked == [(OWN, FIRST), (FIRST, DESCRIBED)]
    assert (choice.gate_up, choice.down, choice.decision) == (LOW, TMA, Decision.TUNED)
    assert choice.layer_times == pytest.approx((60, 100))


def test_descriptors_that_cost_the_layer_more_than_their_kernel_gains_are_not_taken():
    choice, _ = row(Layer({OWN: 100.0, FIRST: 80.0, DESCRIBED: 80.1}), made=search(tma=6.0))
    assert (choice.down, choice.decision) == (LOW, Decision.TUNED)
    assert choice.layer_times == pytest.approx((80, 100))


def test_descriptors_with_wrong_numbers_are_not_taken():
    choice, _ = row(Layer({OWN: 100.0, FIRST: 80.0, DESCRIBED: "not finite"}), made=search(tma=6.0))
    assert choice.down == LOW


def test_descriptors_may_beat_sglangs_own_where_nothing_plain_does():
    choice, _ = row(Layer({OWN: 100.0, FIRST: 100.1, DESCRIBED: 90.0}), made=search(tma=6.0))
    assert (choice.down, choice.decision) == (TMA, Decision.TUNED)
    assert choice.layer_times == pytest.approx((90, 100))


def test_descriptors_that_are_no_faster_are_not_compared():
    assert described_pair(search(), M) is None
    assert described_pair(search(tma=7.99), M) is None
    assert described_pair(search(tma=7.5), M) == DESCRIBED
