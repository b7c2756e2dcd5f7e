"""Timing with CUDA graphs and events: what is captured is replayed back to back, so the host's speed does not count."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """A function bound to everything that it reads: who holds the call holds the memory."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]

    def __call__(self) -> Any:
        """Run it once; the result of the function."""
        return self.function(*self.inputs)


@dataclass(frozen=True)
class Graph:
    """A captured sequence of calls.

    A CUDA graph holds addresses, not tensors: whatever its calls read must live as long as it is replayed, else the
    memory goes to whoever allocates next. So the graph keeps its calls. What the calls allocate themselves lives in
    the graph's own memory pool.

    Attributes:
        calls: what was captured, with its inputs.
        results: what each call gave at its capture; a replay writes their values anew.
    """

    graph: torch.cuda.CUDAGraph
    calls: tuple[Call, ...]
    results: tuple[Any, ...]

    @property
    def launches(self) -> int:
        """How many calls one replay runs."""
        return len(self.calls)


class Clock:
    """Captures and times on a stream of its own, after whatever the caller's stream still has to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, call: Call) -> Any:
        """Run a call once on the clock's stream and wait for it (what is to be captured must have run before)."""
        self._follow_caller()
        with torch.cuda.stream(self._stream):
            result = call()
        self._stream.synchronize()
        return result

    def time_calls(self, calls: Sequence[Call], rounds: int) -> list[float]:
        """Launch calls one after the other, without a graph: the microseconds a call of each round.

        Right only where a call keeps the card busy for longer than the host takes to launch the next.
        """
        self._follow_caller()
        with torch.cuda.stream(self._stream):
            marks = [_record()]
            for _ in range(rounds):
                for call in calls:
                    call()
                marks.append(_record())
        marks[-1].synchronize()
        return [a.elapsed_time(b) * 1e3 / len(calls) for a, b in itertools.pairwise(marks)]

    def capture(self, calls: Sequence[Call]) -> Graph:
        """Capture calls as one CUDA graph (without `torch.cuda.graph`, whose garbage collection takes longer)."""
        graph = torch.cuda.CUDAGraph()
        self._follow_caller()
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                results = tuple(call() for call in calls)
            finally:
                graph.capture_end()
        return Graph(graph, tuple(calls), results)

    def replay(self, graphs: Sequence[Graph], rounds: int) -> list[list[float]]:
        """Replay graphs in turn, back to back: for each graph the microseconds a call of each round.

        Every second round runs in reverse order, so that no graph always follows the same one.
        """
        starts: list[list[torch.cuda.Event]] = [[] for _ in graphs]
        ends: list[list[torch.cuda.Event]] = [[] for _ in graphs]
        order = list(range(len(graphs)))
        self._follow_caller()
        with torch.cuda.stream(self._stream):
            before = _record()
            for round_ in range(rounds):
                for position in order if round_ % 2 == 0 else reversed(order):
                    graphs[position].graph.replay()
                    after = _record()
                    starts[position].append(before)
                    ends[position].append(after)
                    before = after
        before.synchronize()
        return [
            [a.elapsed_time(b) * 1e3 / graph.launches for a, b in zip(begun, done, strict=True)]
            for graph, begun, done in zip(graphs, starts, ends, strict=True)
        ]

    def _follow_caller(self) -> None:
        """Inputs are made on the caller's stream: nothing of the clock's may run before they are there."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
