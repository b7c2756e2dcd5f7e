"""Comparisons in a stand-in for SGLang's layer, on the CPU."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from fixer.base.errors import CardError
from fixer.tuning.duel import DuelRequest, PairError, Via
from fixer.tuning.measure import layer_bench
from fixer.tuning.measure.layer_bench import LayerBench, LayerSetup
from fixer.workload import RowTiles, Tile, Workload
from tests.support import fake_fused_moe as fake

SMALL = Workload(6, 16, 32, 2)


def pair(group: int) -> RowTiles:
    return RowTiles(Tile(16, 32, 64, group), Tile(16, 32, 64, group))


RIGHT, SLOW = pair(fake.RIGHT), pair(fake.SLOW)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_bench, "l2_bytes", lambda _: 1 << 12)
    monkeypatch.setattr(layer_bench, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr("sys.path", __import__("sys").path[:])
    fake.forget()

    def make(workload=SMALL):
        setup = LayerSetup(fake.package(tmp_path), workload, 0, 128)
        return LayerBench(setup, fake.CPU, fake.PlainClock())

    yield make
    fake.forget()


@pytest.mark.parametrize("tokens", [1, 2, 7, 128])
def test_two_right_pairs_are_timed_in_turn(bench, tokens):
    made = bench()
    made.warm_up()
    duel = made.duel(DuelRequest(tokens, SLOW, RIGHT))
    assert (duel.tokens, duel.via) == (tokens, Via.LAYER)
    assert len(duel.own) == len(duel.tuned) >= 7
    assert duel.gain == pytest.approx(1.0, abs=0.01)
    assert duel.is_won
    assert made.duel(DuelRequest(tokens, None, RIGHT)).own == ()


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (fake.CRASHES, "illegal memory access"),
        (fake.WRONG, "wrong numbers at M=7"),
        (fake.LEAVES_OUT, "not finite"),
        (fake.LAST_TOKEN, "wrong numbers"),
    ],
)
@pytest.mark.parametrize("side", ["own", "tuned", "alone"])
def test_whoever_is_wrong_is_named(bench, group, words, side):
    bad = pair(group)
    own, tuned = {"own": (bad, RIGHT), "tuned": (RIGHT, bad), "alone": (None, bad)}[side]
    with pytest.raises(PairError, match=words) as caught:
        bench().duel(DuelRequest(7, own, tuned))
    assert caught.value.pair == bad


def test_an_error_comes_through_a_pipe_with_its_pair():
    error = pickle.loads(pickle.dumps(PairError(RIGHT, "no luck")))
    assert (error.pair, error.message) == (RIGHT, "no luck")


def test_experts_on_another_rank_add_nothing(bench):
    made = bench(replace(SMALL, ep_size=2))
    assert made.duel(DuelRequest(9, SLOW, RIGHT)).is_won


def test_both_sides_get_the_same_inputs_and_each_forward_its_own_copy(bench):
    made, seen = bench(), []
    plain = made._layer.__call__

    class Watching:
        def __call__(self, tiles, hidden, weights, topk_weights, topk_ids):
            seen.append((tiles, hidden, topk_ids, hidden.clone()))
            return plain(tiles, hidden, weights, topk_weights, topk_ids)

    made._layer = Watching()
    made.duel(DuelRequest(5, SLOW, RIGHT))
    of = {
        tiles: [(hidden.data_ptr(), ids.data_ptr()) for t, hidden, ids, _ in seen if t == tiles] for tiles, *_ in seen
    }
    assert len(of) == 2
    own, tuned = of.values()
    assert set(own) == set(tuned)
    assert all(torch.equal(hidden, before) for _, hidden, _, before in seen)  # never overwritten


def test_a_replay_that_reads_other_memory_is_found(bench, monkeypatch):
    """As when a graph's routing was freed and its memory given to somebody else."""
    made = bench()
    plain = fake.PlainClock.replay

    def replay(self, graphs, rounds):
        for graph in graphs:
            for call in graph.calls:
                call.inputs[-1].fill_(0)
        return plain(self, graphs, rounds)

    monkeypatch.setattr(fake.PlainClock, "replay", replay)
    with pytest.raises(PairError, match="replay is off"):
        made.duel(DuelRequest(7, SLOW, RIGHT))


def test_too_close_to_call_is_timed_again(bench, monkeypatch):
    made, rounds_asked = bench(), []

    def replay(self, graphs, rounds):
        rounds_asked.append(rounds)
        wide = [1 + 0.05 * (turn % 5 - 2) for turn in range(rounds)]
        return [[base * turn for turn in wide] for base in (101.0, 100.0)]

    monkeypatch.setattr(fake.PlainClock, "replay", replay)
    duel = made.duel(DuelRequest(7, SLOW, RIGHT))
    assert duel.is_open
    assert len(rounds_asked) == 2 + layer_bench.MORE_ROUNDS
    assert len(duel.own) == len(duel.tuned) == sum(rounds_asked[1:])


def test_a_card_that_is_too_full_says_so(bench, monkeypatch):
    monkeypatch.setattr(layer_bench, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(CardError, match="MiB are free"):
        bench()
