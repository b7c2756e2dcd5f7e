"""Two pairs of configurations in SGLang's own layer: are the numbers right, and which is faster.

Runs in a process of its own: importing SGLang takes longer than the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fixer.base.errors import CardError
from fixer.base.text import told
from fixer.families.fused_moe.arguments import Product, Role
from fixer.families.fused_moe.routing import MIX
from fixer.machine.worker import Handler
from fixer.sglang.layer import LayerWeights, OwnLayer
from fixer.tuning.duel import Duel, DuelRequest, PairError, Via, rounds_for
from fixer.tuning.layer_check import MOST_APART, LayerInputs, layer_reference, most_off, poisoned, sample_of, wrong_by
from fixer.tuning.measure.clock import Call, Clock, Graph
from fixer.tuning.measure.memory import ANY_TILE, layer_room
from fixer.tuning.measure.tensors import TORCH_TYPES, Layer, l2_bytes, make_layer, route
from fixer.workload import BOTH, NumberFormat, RowTiles, Workload

SCALES = {Role.B_SCALE: "scale", Role.B_ZERO_POINT: "zp"}
"""How SGLang names a projection's scales: w1_scale, w1_zp, w2_scale, w2_zp."""

SOFTER = {
    NumberFormat.INT8_W8A8: 1 / 64,
    NumberFormat.INT8_W8A16: 1 / 64,
    NumberFormat.INT4_W4A16: 1 / 4,
}
"""Integers are up to 127 where numbers of other formats are around 1: a layer's output must stay below float16's
65504, since an overflow counts as a wrong result."""

MORE_ROUNDS = 2
"""How often a comparison that is too close to call is timed again."""

FEW_TOKENS = 64
"""Up to this M a graph has every routing twice."""


@dataclass(frozen=True)
class LayerSetup:
    """What the process needs to know: SGLang's package, the layer, the card, the largest M, and a seed."""

    package: Path
    workload: Workload
    device: int
    most_tokens: int
    seed: int = 20260


class LayerBench:
    """One card with SGLang's layer on it.

    Args:
        device: where the tensors are; None for the setup's card.
        clock: None for one of that card.
    """

    def __init__(self, setup: LayerSetup, device: torch.device | None = None, clock: Clock | None = None) -> None:
        self._setup = setup
        self._layer = OwnLayer(setup.package, setup.workload)
        if device is None:
            torch.cuda.set_device(setup.device)
            device = torch.device("cuda", setup.device)
        self._clock = clock or Clock(device)
        self._generator = torch.Generator(device).manual_seed(setup.seed)
        self._up, self._down = self._make_layers()
        self._weights = self._named_weights()
        shape = (setup.most_tokens, setup.workload.hidden_size)
        dtype = TORCH_TYPES[setup.workload.activation_dtype]
        self._source = torch.randn(shape, generator=self._generator, device=device).to(dtype)

    def warm_up(self) -> None:
        """Run it once: that builds SGLang's own CUDA kernels (quantisation, activation) while the search still runs."""
        self._clock.run(self._call(RowTiles(ANY_TILE, ANY_TILE), self._inputs(1, 0)))

    # ---- tensors

    def _make_layers(self) -> tuple[Layer, Layer]:
        """Both projections, in as many copies of their weights as it takes to be several times the L2 cache."""
        workload = self._setup.workload
        copies, needed = layer_room(workload, self._setup.most_tokens, l2_bytes(self._generator.device))
        free = free_bytes(self._generator.device)
        if needed > free:
            raise CardError(f"SGLang's layer needs {needed >> 20} MiB on the card, and {free >> 20} MiB are free.")
        up, down = (make_layer(Product(workload, projection, 1), copies, self._generator) for projection in BOTH)
        for layer in (up, down):
            if Role.B_SCALE in layer.tensors:
                layer.tensors[Role.B_SCALE].mul_(SOFTER.get(workload.number_format, 1.0))
        return up, down

    def _named_weights(self) -> tuple[LayerWeights, ...]:
        scales = {
            f"{name}_{suffix}": layer.tensors[role]
            for name, layer in (("w1", self._up), ("w2", self._down))
            for role, suffix in SCALES.items()
            if role in layer.tensors
        }
        return tuple(LayerWeights(w1, w2, scales) for w1, w2 in zip(self._up.weights, self._down.weights, strict=True))

    def _inputs(self, tokens: int, turn: int) -> LayerInputs:
        """One forward's inputs, the same in every run of every process."""
        workload = self._setup.workload
        generator = torch.Generator(self._generator.device).manual_seed(self._setup.seed + 1000 * tokens + turn)
        topk_ids = route(MIX[turn % len(MIX)], tokens, workload, generator)
        topk_weights = torch.rand(topk_ids.shape, generator=generator, device=topk_ids.device)
        return LayerInputs(self._source[:tokens], topk_ids, topk_weights, turn)

    def _call(self, pair: RowTiles, inputs: LayerInputs) -> Call:
        weights = self._weights[inputs.turn % len(self._weights)]
        tiles = (pair.gate_up, pair.down)
        return Call(self._layer, (tiles, inputs.hidden, weights, inputs.topk_weights, inputs.topk_ids))

    # ---- comparisons

    def duel(self, request: DuelRequest) -> Duel:
        """Check both pairs, then time them in turn on the same inputs.

        Raises:
            PairError: a pair does not run, or its numbers are wrong.
        """
        tokens = request.tokens
        inputs = [self._inputs(tokens, turn) for turn in range(len(MIX) * (2 if tokens <= FEW_TOKENS else 1))]
        expected = self._checked(request, inputs)
        graphs = [self._clock.capture([self._call(pair, one) for one in inputs]) for pair in request.pairs]
        first = self._clock.replay(graphs, 1)
        rounds = rounds_for(sum(times[0] * graph.launches for times, graph in zip(first, graphs, strict=True)))
        duel = self._timed(request, graphs, rounds)
        for _ in range(MORE_ROUNDS):
            if duel.is_open:
                duel = duel.joined(self._timed(request, graphs, rounds))
        for pair, graph in zip(request.pairs, graphs, strict=True):
            self._check_replayed(pair, graph, expected, tokens)
        return duel

    def _timed(self, request: DuelRequest, graphs: list[Graph], rounds: int) -> Duel:
        times = self._clock.replay(graphs, rounds)
        own = tuple(times[0]) if request.own is not None else ()
        return Duel(request.tokens, Via.LAYER, own, tuple(times[-1]))

    # ---- right numbers

    def _checked(self, request: DuelRequest, inputs: list[LayerInputs]) -> list[torch.Tensor]:
        """Run both pairs once on all inputs, among buffers full of NaN, and hold the results against one another.

        Returns:
            What the layer makes of each input.
        """
        results = [[self._run(pair, one) for one in inputs] for pair in request.pairs]
        for turn, one in enumerate(inputs[: len(MIX)]):
            outs = [result[turn] for result in results]
            sample = sample_of(outs[0], outs[1] if len(outs) > 1 else None, self._generator)
            expected = layer_reference(self._up, self._down, one, sample)
            for pair, out in zip(request.pairs, outs, strict=True):
                if not bool(out.isfinite().all()):
                    raise self._wrong(pair, request.tokens, turn, "it is not finite")
                off = wrong_by(out[sample], expected)
                if off > most_off(self._setup.workload.number_format):
                    raise self._wrong(pair, request.tokens, turn, f"relative error {off:.3g}")
            apart = wrong_by(outs[-1], outs[0])
            if apart > MOST_APART:
                raise self._wrong(request.tuned, request.tokens, turn, f"{apart:.3g} apart from SGLang's own")
        return results[0]

    def _run(self, pair: RowTiles, inputs: LayerInputs) -> torch.Tensor:
        try:
            with poisoned():
                out: torch.Tensor = self._clock.run(self._call(pair, inputs))
        except Exception as error:
            raise PairError(pair, f"SGLang's layer failed at M={len(inputs.hidden)}: {told(error)}") from error
        return out

    def _check_replayed(self, pair: RowTiles, graph: Graph, expected: list[torch.Tensor], tokens: int) -> None:
        """Whether what was timed computed what was meant: a graph that reads other memory shows here."""
        for turn, (out, right) in enumerate(zip(graph.results, expected, strict=True)):
            off = wrong_by(out, right)
            if off > MOST_APART:
                raise self._wrong(pair, tokens, turn, f"its replay is off by {off:.3g}")

    @staticmethod
    def _wrong(pair: RowTiles, tokens: int, turn: int, what: str) -> PairError:
        routing = MIX[turn % len(MIX)].value
        return PairError(pair, f"SGLang's layer computes wrong numbers at M={tokens} ({routing} routing): {what}")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a card."""
    return int(torch.cuda.mem_get_info(device)[0])


def layer_handler(setup: LayerSetup) -> Handler:
    """Import SGLang and build the layer (in the child), and give the function that answers."""
    bench = LayerBench(setup)
    bench.warm_up()

    def handle(request: DuelRequest) -> Duel:
        try:
            return bench.duel(request)
        except PairError:
            raise
        except Exception as error:
            raise PairError(None, f"SGLang's layer failed at M={request.tokens}: {told(error)}") from error

    return handle
