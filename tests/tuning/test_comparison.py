"""A comparison that fails is settled: tried again in a new process, and whoever fails twice is at fault."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path

import pytest

from fixer.base.errors import TuneError
from fixer.machine.worker import ChildProcess, Fate
from fixer.tuning import comparison
from fixer.tuning.comparison import MOST_RESTARTS, LayerComparisons, Question
from fixer.tuning.duel import Duel, DuelRequest, PairError, Via
from fixer.workload import NumberFormat, RowTiles, Tile, Workload
from tests.support import fake_layer

OWN, TUNED = (RowTiles(Tile(size, 64, 64, 1), Tile(size, 64, 64, 1)) for size in (32, 16))
BOTH = DuelRequest(3072, OWN, TUNED)
QUESTION = Question(
    Path("/x/sglang"), Workload(8, 64, 128, 2, NumberFormat.FP8_W8A8, block_shape=(128, 128)), 0, 8192, Path("/x/cache")
)


def duel(request: DuelRequest) -> Duel:
    return Duel(request.tokens, Via.LAYER, (2.0,) * 7 if request.own else (), (1.0,) * 7)


class Child:
    """Stands in for the process: `behave` maps the pairs of a request and the count of its asking to an answer."""

    def __init__(self, behave) -> None:
        self.behave, self.asked, self.restarts, self.is_alive = behave, [], -1, False

    def wait_ready(self) -> None:
        if not self.is_alive:
            self.restarts += 1
        self.is_alive = True
        if self.behave == "cannot start":
            raise TuneError("SGLang's own MoE layer cannot be called here: no module")

    def ask(self, request: DuelRequest, seconds: float):
        self.asked.append(request.pairs)
        answer = self.behave(request.pairs, self.asked.count(request.pairs))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Fate):
            self.is_alive = False
        return duel(request) if answer is None else answer

    def close(self) -> None:
        self.is_alive = False


def settle(behave, request=BOTH):
    child, notes = Child(behave), []
    settled = LayerComparisons(child, QUESTION, notes.append).settle(request)
    return settled, notes, child


def fails(*bad: RowTiles, how=Fate.CRASHED, named=False):
    """Every request with one of these pairs fails."""

    def behave(pairs, _):
        at_fault = next((pair for pair in pairs if pair in bad), None)
        if at_fault is None:
            return None
        return PairError(at_fault, "relative error 0.5") if named else how

    return behave


def test_one_that_works_is_asked_once():
    settled, notes, child = settle(lambda *_: None)
    assert settled.duel == duel(BOTH)
    assert (settled.faults, notes, child.asked, child.restarts) == ({}, [], [(OWN, TUNED)], 0)


@pytest.mark.parametrize("how", [Fate.CRASHED, Fate.TIMED_OUT, PairError(None, "no luck"), PairError(TUNED, "no luck")])
def test_one_that_fails_once_is_tried_again_in_a_new_process(how):
    settled, notes, child = settle(lambda _, count: how if count == 1 else None)
    assert settled.duel == duel(BOTH)
    assert settled.faults == {}
    assert child.restarts == 1
    (note,) = notes
    assert note.startswith("M=3072: a comparison failed once and not again")


@pytest.mark.parametrize("named", [False, True])
def test_a_tuned_pair_that_fails_twice_is_at_fault(named):
    settled, notes, child = settle(fails(TUNED, named=named))
    assert settled.duel is None
    assert list(settled.faults) == [TUNED]
    assert child.asked.count((OWN,)) == 1  # which was found well alone
    (note,) = notes
    assert "M=3072: SGLang's own layer failed twice with a tuned one, 16x64x64" in note
    assert "to see it again: python" in note


@pytest.mark.parametrize("named", [False, True])
def test_sglangs_own_at_fault_is_cured(named):
    settled, notes, _ = settle(fails(OWN, named=named))
    assert settled.duel == duel(DuelRequest(3072, None, TUNED))
    assert list(settled.faults) == [OWN]
    assert "SGLang's own configuration, 32x64x64" in notes[0]


def test_a_layer_that_fails_with_everything_is_said_loudly_with_the_command():
    settled, notes, child = settle(fails(OWN, TUNED))
    assert settled.duel is None
    assert set(settled.faults) == {OWN, TUNED}
    (note,) = notes
    assert "with every configuration tried, SGLang's own too (the measuring process crashed)" in note
    assert "-m fixer.tuning.comparison" in note
    assert child.restarts == 5  # twice together, twice each alone


def test_two_that_fail_only_together_leave_nothing_installed():
    settled, notes, _ = settle(lambda pairs, _: Fate.CRASHED if len(pairs) == 2 else None)
    assert (settled.duel, settled.faults) == (None, {})
    assert "with neither alone" in notes[0]


def test_one_pair_alone_that_recovers_has_its_times():
    request = DuelRequest(5, None, TUNED)
    settled, _, _ = settle(lambda _, count: Fate.CRASHED if count < 3 else None, request)
    assert settled.duel == duel(request)
    assert settled.faults == {}


def test_one_failing_row_decides_nothing_for_the_others():
    child = Child(lambda pairs, _: Fate.CRASHED if child.row == 3072 else None)
    notes: list[str] = []
    layer = LayerComparisons(child, None, notes.append)
    verdicts = []
    for row in (1, 3072, 4096):
        child.row = row
        verdicts.append(layer.settle(DuelRequest(row, OWN, TUNED)).duel)
    assert [verdict is not None for verdict in verdicts] == [True, False, True]
    assert layer.why_missing == ""


def test_a_layer_that_cannot_start_is_missing_and_nobodys_fault():
    settled, notes, child = settle("cannot start")
    assert (settled.duel, settled.faults, notes) == (None, {}, [])
    layer = LayerComparisons(child, QUESTION, notes.append)
    layer.settle(BOTH)
    assert "no module" in layer.why_missing


def test_it_ends_where_every_process_is_lost():
    child = Child(lambda *_: Fate.CRASHED)
    layer = LayerComparisons(child, None, lambda _: None)
    for row in range(1, 30):
        assert set(layer.settle(DuelRequest(row, OWN, TUNED)).faults) == {OWN, TUNED}
    assert child.restarts <= MOST_RESTARTS


def test_with_real_processes(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_layer.LOG, str(tmp_path / "log"))
    monkeypatch.setenv(fake_layer.FAULTS, json.dumps({"64": "crash"}))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    child, notes = ChildProcess(partial(fake_layer.layer, 16)), []
    try:
        layer = LayerComparisons(child, QUESTION, notes.append)
        assert layer.settle(DuelRequest(1, OWN, TUNED)).duel is not None
        assert set(layer.settle(DuelRequest(64, OWN, TUNED)).faults) == {OWN, TUNED}
        assert layer.settle(DuelRequest(256, OWN, TUNED)).duel is not None
    finally:
        child.close()
    assert len(notes) == 1


def test_the_command_runs_the_same_comparison(monkeypatch, capsys):
    words = shlex.split(QUESTION.command(BOTH))
    assert words[1:3] == ["-m", "fixer.tuning.comparison"]
    asked = []

    class Again(Child):
        def ask(self, request, seconds):
            asked.append(request)
            return super().ask(request, seconds)

    def start(question):
        assert question == QUESTION
        return Again(fails(TUNED) if asked else lambda *_: None)

    monkeypatch.setattr(Question, "start", start)
    assert comparison.main(words[3:]) == 0
    assert asked == [BOTH]
    assert "M=3072 32x64x64 group 1, 4 warps, 3 stages" in capsys.readouterr().out
    assert comparison.main(words[3:]) == 1
    assert "crashed" in capsys.readouterr().out
