"""The clock on a stand-in for CUDA: what a graph reads lives as long as the graph."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from fixer.tuning.measure.clock import Call, Clock


class FakeGraph:
    """Records nothing: a real one holds addresses, and no tensor either."""

    def capture_begin(self):
        pass

    def capture_end(self):
        pass

    def replay(self):
        pass


class FakeStream:
    def __init__(self, *_):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def synchronize(self):
        pass


class FakeEvent:
    def __init__(self, **_):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 1.0


CALLERS = FakeStream()


@pytest.fixture
def clock(monkeypatch):
    @contextmanager
    def stream(_):
        yield

    for name, value in {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": stream,
        "current_stream": lambda *_: CALLERS,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Clock(torch.device("cuda", 0))


def test_a_graph_keeps_what_its_calls_read(clock):
    routing = torch.tensor([3, 1, 2])
    graph = clock.capture([Call(torch.sum, (routing,))])
    alive = weakref.ref(routing)
    del routing
    gc.collect()
    assert alive() is not None
    clock.replay([graph], 2)
    del graph
    gc.collect()
    assert alive() is None


def test_a_graph_keeps_what_its_calls_made(clock):
    graph = clock.capture([Call(torch.neg, (torch.ones(2),)), Call(torch.neg, (torch.zeros(2),))])
    assert [result.tolist() for result in graph.results] == [[-1, -1], [0, 0]]
    assert graph.launches == 2


@pytest.mark.parametrize("work", ["run", "capture", "replay"])
def test_nothing_runs_before_the_caller_has_made_its_inputs(clock, work):
    graph = clock.capture([Call(torch.neg, (torch.ones(2),))])
    clock._stream.waited.clear()
    match work:
        case "run":
            assert clock.run(Call(torch.neg, (torch.ones(1),))).item() == -1
        case "capture":
            clock.capture([])
        case "replay":
            clock.replay([graph], 1)
    assert clock._stream.waited == [CALLERS]


def test_times_are_of_a_call(clock):
    graphs = [clock.capture([Call(torch.neg, (torch.ones(1),))] * count) for count in (1, 4)]
    assert clock.replay(graphs, 3) == [[1000.0] * 3, [250.0] * 3]


def test_a_capture_that_fails_is_ended(clock, monkeypatch):
    ended = []

    def end(graph):
        ended.append(graph)

    monkeypatch.setattr(FakeGraph, "capture_end", end)
    with pytest.raises(RuntimeError, match="out of memory"):
        clock.capture([Call(_fail, ())])
    assert len(ended) == 1


def _fail():
    raise RuntimeError("out of memory")
