"""Duels through SGLang's own layer. Runs in a process of its own: importing SGLang takes longer than the search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fixer.base.errors import CardError, TuneError
from fixer.base.text import told
from fixer.kernel.arguments import Product, Role
from fixer.machine.worker import Handler
from fixer.sglang.layer import LayerWeights, OwnLayer
from fixer.tuning.duel import Duel, DuelRequest, Via, rounds_for
from fixer.tuning.measure.clock import Clock, Graph
from fixer.tuning.measure.memory import layer_room
from fixer.tuning.measure.routing import MIX
from fixer.tuning.measure.tensors import TORCH_TYPES, l2_bytes, make_layer, route
from fixer.workload import BOTH, TilePair, Workload

SCALES = {Role.B_SCALE: "scale", Role.B_ZERO_POINT: "zp"}
"""How SGLang names a projection's scales: w1_scale, w1_zp, w2_scale, w2_zp."""


@dataclass(frozen=True)
class LayerSetup:
    """What the process needs to know: SGLang's package, the layer, the card, the largest M, and a seed."""

    package: Path
    workload: Workload
    device: int
    most_tokens: int
    seed: int = 20260


class LayerBench:
    """One card with SGLang's layer on it."""

    def __init__(self, setup: LayerSetup) -> None:
        self._setup = setup
        self._layer = OwnLayer(setup.package, setup.workload)
        torch.cuda.set_device(setup.device)
        device = torch.device("cuda", setup.device)
        self._clock = Clock(device)
        self._generator = torch.Generator(device).manual_seed(setup.seed)
        self._weights = self._make_weights()
        shape = (setup.most_tokens, setup.workload.hidden_size)
        dtype = TORCH_TYPES[setup.workload.activation_dtype]
        self._source = torch.randn(shape, generator=self._generator, device=device).to(dtype)
        self._hidden = torch.empty_like(self._source)
        # Builds SGLang's own CUDA kernels (for quantisation, activation) while the search still runs.
        self._clock.run(self._call(1, 0))

    def _make_weights(self) -> tuple[LayerWeights, ...]:
        """Weights of both projections, in as many copies as it takes to be several times the L2 cache."""
        products = [Product(self._setup.workload, projection, 1) for projection in BOTH]
        copies, needed = layer_room(self._setup.workload, self._setup.most_tokens, l2_bytes(self._generator.device))
        free, _ = torch.cuda.mem_get_info(self._generator.device)
        if needed > free:
            raise CardError(f"SGLang's layer needs {needed >> 20} MiB on the card, and {free >> 20} MiB are free.")
        up, down = (make_layer(product, copies, self._generator) for product in products)
        scales = {
            f"{name}_{suffix}": layer.tensors[role]
            for name, layer in (("w1", up), ("w2", down))
            for role, suffix in SCALES.items()
            if role in layer.tensors
        }
        return tuple(LayerWeights(w1, w2, scales) for w1, w2 in zip(up.weights, down.weights, strict=True))

    def duel(self, request: DuelRequest) -> Duel:
        """Time both pairs in turn, after one run of each."""
        pairs = [pair for pair in (request.own, request.tuned) if pair is not None]
        graphs = [self._graph(request.tokens, pair) for pair in pairs]
        first = self._clock.replay(graphs, 1)
        rounds = rounds_for(sum(times[0] * graph.launches for times, graph in zip(first, graphs, strict=True)))
        times = self._clock.replay(graphs, rounds)
        own = tuple(times[0]) if request.own is not None else ()
        return Duel(request.tokens, Via.LAYER, own, tuple(times[-1]))

    def _graph(self, tokens: int, pair: TilePair) -> Graph:
        calls = [self._call(tokens, turn) for turn in range(2 * len(MIX) if tokens <= 64 else len(MIX))]
        self._layer.choose(pair.gate_up, pair.down)
        self._clock.run(calls[0])  # loads the kernels, from Triton's cache, outside the capture
        return self._clock.capture(calls)

    def _call(self, tokens: int, turn: int) -> Callable[[], None]:
        workload = self._setup.workload
        # The same seed for both pairs: they get the same routings.
        generator = torch.Generator(self._generator.device).manual_seed(self._setup.seed + 1000 * tokens + turn)
        topk_ids = route(MIX[turn % len(MIX)], tokens, workload, generator)
        topk_weights = torch.rand(topk_ids.shape, generator=generator, device=topk_ids.device)
        hidden, source = self._hidden[:tokens], self._source[:tokens]
        weights = self._weights[turn % len(self._weights)]

        def call() -> None:
            hidden.copy_(source)  # the layer works in place; both sides pay for this
            self._layer(hidden, weights, topk_weights, topk_ids)

        return call


def layer_handler(setup: LayerSetup) -> Handler:
    """Import SGLang and build the layer (in the child), and give the function that answers."""
    bench = LayerBench(setup)

    def handle(request: DuelRequest) -> Duel:
        try:
            return bench.duel(request)
        except Exception as error:
            raise TuneError(f"SGLang's layer failed at M={request.tokens}: {told(error)}") from error

    return handle
