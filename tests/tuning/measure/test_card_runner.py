"""The runner in front of cards, with real compilation and a stand-in for the process that measures."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.base.errors import CardError, TuneError
from fixer.kernel.compile import Candidate, Target
from fixer.kernel.pool import FixedDeadline
from fixer.kernel.source import read_kernel_source
from fixer.tuning.duel import DuelRequest
from fixer.tuning.measure import card_runner
from fixer.tuning.measure.card_runner import CardRunner
from fixer.tuning.measure.requests import LOOK_REPLAYS
from fixer.tuning.search.runner import Request
from fixer.tuning.search.trials import Outcome
from fixer.workload import Projection, RowTiles, Tile, Workload
from tests.support import fakes

LAYER = Workload(8, 64, 128, 2)
ROWS = (1, 4, 16, 64)
UP, DOWN = Projection.GATE_UP, Projection.DOWN
TILES = [Tile(16, 32, 64, 1, 4, 2), Tile(16, 64, 64, 1, 4, 3), Tile(32, 64, 64, 1, 4, 3), Tile(16, 128, 64, 1, 4, 3)]
A, B, C, D = (fakes.kernel(UP, t.block_m, t.block_n, t.block_k, t.group_m, t.num_warps, t.num_stages) for t in TILES)
A_DOWN = replace(A, projection=DOWN)
BAD_TILE = fakes.kernel(UP, 16, 32, 48, 1, 4, 2)  # 48 is no power of two: Triton refuses it


def unwilling(setup):
    """A factory whose card is too full."""
    del setup
    raise CardError("the card is full", "stop what else uses it")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Triton's cache, for all tests of this file."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def make(trees, kept, log, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fakes.stub_torch(tmp_path / "stub"))
    monkeypatch.setenv(fakes.LOG, str(log))

    def make_one(faults=None, **options):
        monkeypatch.setenv(fakes.FAULTS, json.dumps({fakes.name_of(kernel): how for kernel, how in faults.items()}))
        target = Target(read_kernel_source(trees["0.5.17"].kernel_source), 90, kept / "kernels")
        options = {"devices": [0], "shared_limit": 232448, "folder": kept / "triton", "workers": 2} | options
        return CardRunner(LAYER, target, rows=ROWS, factory=fakes.measure, deadline=FixedDeadline(60), **options)

    return lambda faults=None, **options: make_one(faults or {}, **options)


def look(runner, *kernels, rows=ROWS):
    return {answer.build.kernel: answer for answer in runner.look([Request(kernel, rows) for kernel in kernels])}


def children(log: Path) -> set[int]:
    return fakes.processes_with(fakes.LOG, str(log)) - fakes.helpers()


def test_every_request_has_one_answer_and_nothing_is_left(make, log):
    with make() as runner:
        requests = [Request(kernel, ROWS) for kernel in (A, B, A_DOWN)]
        answers = list(runner.look(requests))
        assert children(log)
    assert fakes.eventually(lambda: children(log) == set())
    assert sorted(map(fakes.name_of, (answer.build.kernel for answer in answers))) == sorted(
        map(fakes.name_of, (A, B, A_DOWN))
    )
    for answer in answers:
        build = answer.build
        assert build.outcome is Outcome.OK
        assert (build.registers, build.shared_bytes) == (40, 4096)  # from the card
        assert [timing.tokens for timing in answer.timings] == list(ROWS)
        for timing in answer.timings:
            assert timing.microseconds == fakes.microseconds(build.kernel, timing.tokens)
            assert timing.replays == LOOK_REPLAYS
    assert runner.restarts == 0


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("crash", Outcome.CRASHED), ("hang", Outcome.TIMED_OUT), ("wrong", Outcome.WRONG_RESULT)],
)
def test_a_fault_costs_one_candidate(make, log, monkeypatch, fault, outcome):
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 1.0)
    with make({B: fault}) as runner:
        answers = look(runner, A, B, C)
        assert {kernel: answer.build.outcome for kernel, answer in answers.items()} == {
            A: Outcome.OK,
            B: outcome,
            C: Outcome.OK,
        }
        assert answers[B].timings == ()
        assert look(runner, D)[D].build.outcome is Outcome.OK
        assert runner.restarts == (fault != "wrong")
        assert len(fakes.logged(log, "start")) == 1 + runner.restarts
    assert fakes.eventually(lambda: children(log) == set())


def test_fault_after_fault(make, monkeypatch):
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 1.0)
    faults = {A: "crash", B: "hang", C: "wrong", A_DOWN: "crash"}
    with make(faults) as runner:
        answers = look(runner, A, B, C, D, A_DOWN, BAD_TILE)
        assert look(runner, replace(D, projection=DOWN)).popitem()[1].build.outcome is Outcome.OK
        assert runner.restarts == 3
    assert {kernel: answer.build.outcome for kernel, answer in answers.items()} == {
        A: Outcome.CRASHED,
        B: Outcome.TIMED_OUT,
        C: Outcome.WRONG_RESULT,
        D: Outcome.OK,
        A_DOWN: Outcome.CRASHED,
        BAD_TILE: Outcome.COMPILE_ERROR,
    }
    assert answers[BAD_TILE].build.message


def test_two_cards_share_the_rows(make, log):
    with make(devices=[0, 1]) as runner:
        answers = look(runner, A, B, C, A_DOWN)
        closer = list(runner.closer([(kernel, tokens) for kernel in (A, B) for tokens in ROWS], 7))
    for answer in answers.values():
        assert answer.build.outcome is Outcome.OK
        assert {timing.tokens for timing in answer.timings} == set(ROWS)
    assert {(t.kernel, t.tokens, t.replays) for t in closer} == {(k, m, 7) for k in (A, B) for m in ROWS}
    cards_of = {tokens: set() for tokens in ROWS}
    for device, _, tokens, _ in fakes.logged(log, "time"):
        cards_of[int(tokens)].add(device)
    assert all(len(cards) == 1 for cards in cards_of.values()), cards_of
    assert {card for cards in cards_of.values() for card in cards} == {"0", "1"}
    assert fakes.repeated(log) == []


def test_a_kernel_that_fails_on_one_of_two_cards_has_no_times(make, monkeypatch):
    """What a look says of a kernel that failed must not be chosen: its times are void (`Look`)."""
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 5.0)
    with make({B: "crash only on 1"}, devices=[0, 1]) as runner:
        answers = look(runner, A, B)
    assert answers[A].build.outcome is Outcome.OK
    assert answers[B].build.outcome is Outcome.CRASHED
    assert answers[B].timings == ()


def test_what_needs_too_much_shared_memory_never_reaches_the_card(make, log):
    with make() as runner:
        needed = {kernel: answer.build for kernel, answer in look(runner, A).items()}
    assert needed[A].outcome is Outcome.OK
    log.unlink()
    with make(shared_limit=10_000) as runner:
        answers = look(runner, A, B)
    assert answers[A].build.outcome is Outcome.OK  # 6144 bytes
    assert answers[B].build.outcome is Outcome.TOO_MUCH_SHARED_MEMORY
    assert answers[B].build.shared_bytes > 10_000
    assert {line[1] for line in fakes.logged(log, "look")} == {fakes.name_of(A)}


def test_compiled_ahead_goes_into_the_servers_cache(make, tmp_path):
    servers = tmp_path / "server"
    with make() as runner:
        look(runner, A)
        runner.compile_ahead([Candidate(LAYER, UP, A.tile, 16), Candidate(LAYER, DOWN, A.tile, 16)], servers)
        assert runner.to_compile == 2
        assert list(runner.closer([(A, 1)], 7))  # the card goes on meanwhile
        steps = sum(1 for _ in runner.finish_compiling())
        assert steps <= 2
        assert runner.to_compile == 0
    assert len(fakes.cubins(servers)) == 2


def test_a_closer_look_that_dies_has_no_answer_and_the_others_have(make, monkeypatch):
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 1.0)
    with make({A: "crash", B: "hang"}) as runner:
        timings = list(runner.closer([(A, 1), (C, 1), (B, 1), (D, 1)], 17))
        assert runner.restarts == 3  # the four in turn, then each alone
    assert [timing.kernel for timing in timings] == [C, D]
    assert {timing.replays for timing in timings} == {17}


def test_a_duel(make):
    pair, own = RowTiles(A.tile, A.tile), RowTiles(C.tile, C.tile)
    with make() as runner:
        answer = runner.duel(DuelRequest(16, own, pair))
    assert answer.duel.tokens == 16
    assert len(answer.duel.own) == len(answer.duel.tuned) == 7
    assert set(answer.medians) == {*pair.kernels, *own.kernels}


def test_a_card_that_cannot_be_used_is_a_clear_error(make, trees, kept):
    target = Target(read_kernel_source(trees["0.5.17"].kernel_source), 90, kept / "kernels")
    options = {"devices": [0], "rows": ROWS, "shared_limit": 232448, "folder": kept / "triton", "workers": 1}
    before = fakes.descendants_of_me()
    with (
        CardRunner(LAYER, target, factory=unwilling, **options) as runner,
        pytest.raises(CardError, match="the card is full"),
    ):
        look(runner, A)
    assert fakes.eventually(lambda: not fakes.descendants_of_me() - before - fakes.helpers())


def test_an_error_in_the_middle_leaves_no_process(make, log):
    class StopHereError(Exception):
        pass

    def stopped_at_the_first(runner):
        for _ in runner.look([Request(kernel, ROWS) for kernel in (A, B, C, D)]):
            raise StopHereError

    runner = make()
    with pytest.raises(StopHereError), runner:
        stopped_at_the_first(runner)
    assert fakes.eventually(lambda: children(log) == set())


def test_measuring_starts_while_others_compile(make, log):
    """The card does not wait for the last kernel."""
    with make() as runner:
        answers = runner.look([Request(kernel, (1,)) for kernel in (A, B, C, D)])
        began = time.monotonic()
        next(answers)
        first = time.monotonic() - began
        rest = list(answers)
        assert first < time.monotonic() - began
        assert len(rest) == 3


def test_a_process_that_dies_at_its_start_is_an_error_and_not_started_again_and_again(make, log, trees, kept):
    target = Target(read_kernel_source(trees["0.5.17"].kernel_source), 90, kept / "kernels")
    options = {"devices": [0], "rows": ROWS, "shared_limit": 232448, "folder": kept / "triton", "workers": 1}
    with CardRunner(LAYER, target, factory=fakes.dead, **options) as runner:
        assert fakes.eventually(lambda: fakes.logged(log, "dies") and not runner._cards[0].child._process.is_alive())
        with pytest.raises(TuneError, match="could not start"):
            look(runner, A)
    assert len(fakes.logged(log, "dies")) == 1


def test_a_card_that_answers_nothing_ends_the_run(make, log, monkeypatch):
    monkeypatch.setattr(card_runner, "MOST_FAULTS", 2)
    with make({A: "crash", B: "crash", C: "crash"}) as runner, pytest.raises(TuneError, match="2 times in a row"):
        look(runner, A, B, C)
    assert fakes.eventually(lambda: children(log) == set())
