"""Timing with CUDA graphs and events: what is captured is replayed back to back, so the host's speed does not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Graph:
    """A captured sequence of `launches` equal calls."""

    graph: torch.cuda.CUDAGraph
    launches: int


class Clock:
    """Captures and times on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, call: Callable[[], None]) -> None:
        """Run a call once on the clock's stream and wait for it (what is to be captured must have run before)."""
        with torch.cuda.stream(self._stream):
            call()
        self._stream.synchronize()

    def capture(self, calls: Sequence[Callable[[], None]]) -> Graph:
        """Capture calls as one CUDA graph (without `torch.cuda.graph`, whose garbage collection takes longer)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        return Graph(graph, len(calls))

    def replay(self, graphs: Sequence[Graph], rounds: int) -> list[list[float]]:
        """Replay graphs in turn, back to back: for each graph the microseconds a call of each round.

        Every second round runs in reverse order, so that no graph always follows the same one.
        """
        starts: list[list[torch.cuda.Event]] = [[] for _ in graphs]
        ends: list[list[torch.cuda.Event]] = [[] for _ in graphs]
        order = list(range(len(graphs)))
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


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
