"""Timing kernels on one card. Runs in the measuring process only: it is what may crash, hang or run out of memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fixer.base.errors import CardError, TuneError
from fixer.base.progress import tell
from fixer.families.fused_moe.arguments import LaunchContext, Product, Role, launch_arguments, padded_tokens
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.families.fused_moe.routing import MIX, Routing
from fixer.kernel.compile import (
    Candidate,
    complaint,
    compute_type,
    kernel_function,
    swaps_operands,
    tensor_descriptors,
    warm_kernel,
)
from fixer.tuning.duel import Duel, KernelDuel, Via, rounds_for
from fixer.tuning.measure.clock import Call, Clock, Graph
from fixer.tuning.measure.memory import COLD_FACTOR, needed_bytes, rotations, smallest_rotation, with_spare
from fixer.tuning.measure.requests import LOOK_REPLAYS, Setup
from fixer.tuning.measure.tensors import Aligned, Layer, align, l2_bytes, make_layer, reference, relative_error, route
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import BOTH, Kernel, Projection, RowTiles

MAX_ERROR = 0.02
"""Relative Frobenius norm against the float32 reference; right kernels come to 0.002 to 0.004."""

CHECK_TOKENS = 37
"""M of the comparison with the reference: odd, so that partly filled blocks are part of it."""

MOST_GRAPHS = 1000
"""Captured graphs that are kept for another look; the oldest goes first."""

HOPELESS = 1.5
"""A first launch or replay this many times slower than the row's best is not looked at again."""

LONG_LAUNCH = 150.0
"""Microseconds: from here on the card, not the host, sets the pace (a launch costs the host about 20), so that a look
needs no graph, and one launch says enough of a hopeless kernel."""

LOOK_BUDGET = 5_000.0
"""Microseconds that a first look's replays may take where a single one is shorter."""

TALLEST = max(FUSED_MOE.axis["block_m"].values)

FEWEST_TURNS = 3
TURN_BUDGET = 7_500.0
"""Microseconds for each replay that is asked for, over all kernels of a row."""


@dataclass(frozen=True)
class Loaded:
    """A kernel on the card, ready to launch."""

    kernel: Kernel
    launcher: Any
    build: Build


class Bench:
    """One card's tensors and clocks for one workload.

    Raises:
        CardError: the card is too full for the layer's weights.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        torch.cuda.set_device(setup.device)
        self._device = torch.device("cuda", setup.device)
        self._clock = Clock(self._device)
        with triton_cache(setup.server_cache):
            build_driver()
        self._generator = torch.Generator(self._device).manual_seed(setup.seed)
        self._loaded: dict[Kernel, Loaded | Build] = {}
        self._chosen: dict[int, list[torch.Tensor]] = {}
        self._aligned: dict[tuple[int, int, int], Aligned] = {}
        self._graphs: dict[tuple[Kernel, int], Graph] = {}
        self._layers = self._make_layers()
        self._expected: dict[Projection, tuple[torch.Tensor, torch.Tensor]] = {}

    # ---- tensors

    def _make_layers(self) -> dict[Projection, Layer]:
        workload, most = self.setup.workload, max(*self.setup.rows, CHECK_TOKENS)
        products = {projection: Product(workload, projection, most) for projection in BOTH}
        free, _ = torch.cuda.mem_get_info(self._device)
        cache = l2_bytes(self._device)
        chosen = rotations(products, cache, free)
        if chosen is None:
            least = sum(needed_bytes(products[p], smallest_rotation(products[p], cache)) for p in BOTH)
            raise CardError(
                f"Tuning needs {with_spare(least) >> 20} MiB on the card, and {free >> 20} MiB are free.",
                "Stop what else uses the card (nvidia-smi shows it) and try again.",
            )
        fewest = min(rotation.experts for rotation in chosen.values())
        if fewest < workload.experts:
            said = f"{free >> 20} MiB are free on the card: weights of {fewest} of {workload.experts} experts are used"
            tell(said)
        longest = padded_tokens(workload, most, TALLEST)
        in_order = {p: longest if p is Projection.DOWN and p in self.setup.descriptors else 0 for p in BOTH}
        return {
            p: make_layer(products[p], chosen[p].copies, self._generator, chosen[p].experts, in_order[p]) for p in BOTH
        }

    def _launches(self, projection: Projection, tokens: int) -> int:
        """How many launches make one graph: enough to read several times the L2 cache, in whole routing mixes."""
        weights = self._layers[projection].weights[0]
        workload = self.setup.workload
        routed = -(-tokens * workload.top_k // workload.ep_size)
        touched = min(workload.experts, routed) * weights[0].nbytes
        wanted = -(-COLD_FACTOR * l2_bytes(self._device) // max(touched, 1))
        return int(max(len(MIX), min(24, -(-wanted // len(MIX)) * len(MIX))))

    def _choice(self, tokens: int, turn: int) -> torch.Tensor:
        workload = self.setup.workload
        chosen = self._chosen.setdefault(tokens, [])
        while len(chosen) <= turn:
            # Seeded by row and turn, so that every run of every process sees the same routings.
            seed = self.setup.seed + 1000 * tokens + len(chosen)
            generator = torch.Generator(self._device).manual_seed(seed)
            routing = MIX[len(chosen) % len(MIX)]
            chosen.append(route(routing, tokens, workload, generator))
        return chosen[turn]

    def _align(self, tokens: int, block_m: int, turn: int) -> Aligned:
        key = (tokens, block_m, turn)
        if key not in self._aligned:
            workload = self.setup.workload
            length = padded_tokens(workload, tokens, block_m)
            self._aligned[key] = align(self._choice(tokens, turn), block_m, workload.experts, length)
        return self._aligned[key]

    # ---- kernels

    def load(self, kernel: Kernel) -> Build:
        """Put a compiled kernel on the card and check its arithmetic; what goes wrong is an outcome."""
        if kernel not in self._loaded:
            self._loaded[kernel] = self._load(kernel)
        known = self._loaded[kernel]
        return known if isinstance(known, Build) else known.build

    def _load(self, kernel: Kernel) -> Loaded | Build:
        from triton.runtime.errors import OutOfResources

        try:
            launcher = warm_kernel(self.setup.target, Candidate(self.setup.workload, kernel.projection, kernel.tile))
        except Exception as error:
            return Build(kernel, Outcome.COMPILE_ERROR, message=complaint(error))
        shared = int(launcher.metadata.shared)
        if shared > self.setup.shared_limit:
            return Build(kernel, Outcome.TOO_MUCH_SHARED_MEMORY, shared)
        try:
            with triton_cache(self.setup.server_cache):  # the launcher's C code is the server's too
                launcher._init_handles()
        except OutOfResources as error:
            return Build(kernel, Outcome.TOO_MUCH_SHARED_MEMORY, shared, message=complaint(error))
        build = Build(kernel, Outcome.OK, shared, int(launcher.n_regs), int(launcher.n_spills))
        loaded = Loaded(kernel, launcher, build)
        wrong_by = self._error_of(loaded)
        if wrong_by > MAX_ERROR:
            return Build(kernel, Outcome.WRONG_RESULT, shared, message=f"relative error {wrong_by:.3g}")
        return loaded

    def _error_of(self, loaded: Loaded) -> float:
        layer = self._layers[loaded.kernel.projection]
        chosen, expected = self._check_case(loaded.kernel.projection)
        workload, block_m = self.setup.workload, loaded.kernel.tile.block_m
        aligned = align(chosen, block_m, workload.experts, padded_tokens(workload, CHECK_TOKENS, block_m))
        in_order = reads_in_order(loaded.kernel)
        if in_order:
            few = replace(layer, product=replace(layer.product, tokens=CHECK_TOKENS))
            layer = replace(layer, in_order=few.sorted_as(aligned).in_order)
        tensors = layer.launch_tensors(CHECK_TOKENS, aligned, 0, in_order=in_order)
        tensors[Role.C].fill_(float("nan"))  # what the kernel leaves out must not look right
        self._launcher(loaded, CHECK_TOKENS, tensors)()
        return relative_error(tensors[Role.C].view_as(expected), expected)

    def _check_case(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        if projection not in self._expected:
            workload = self.setup.workload
            chosen = route(Routing.ZIPF, CHECK_TOKENS, workload, self._generator)
            self._expected[projection] = chosen, reference(self._layers[projection], chosen)
        return self._expected[projection]

    def _launcher(self, loaded: Loaded, tokens: int, tensors: Mapping[Role, Any]) -> Call:
        """A call that launches a kernel once, with all its arguments bound."""
        workload, tile = self.setup.workload, loaded.kernel.tile
        product = Product(workload, loaded.kernel.projection, tokens)
        function = kernel_function(self.setup.target, workload)
        names = [parameter.name for parameter in function.params]
        descriptors = tensor_descriptors(product, tile, tensors[Role.A], tensors[Role.B])
        target = self.setup.target
        swapped = swaps_operands(target, workload, tile)
        context = LaunchContext(target.arch, compute_type(workload), descriptors, swap_ab=swapped)
        arguments = launch_arguments(names, product, tile, tensors, context)
        values = tuple(arguments[name] for name in names)
        blocks = -(-tensors[Role.SORTED_TOKEN_IDS].shape[0] // tile.block_m) * -(-product.columns // tile.block_n)
        return Call(loaded.launcher[(blocks, 1, 1)], values)

    # ---- times

    def row_graph(self, kernel: Kernel, tokens: int) -> Graph:
        """The graph of a loaded kernel's launches for one row: cold weights, mixed routings.

        Raises:
            TuneError: the kernel is not on the card.
        """
        return self._clock.capture(self._row_calls(kernel, tokens))

    def _row_calls(self, kernel: Kernel, tokens: int) -> list[Call]:
        loaded = self._loaded.get(kernel)
        if not isinstance(loaded, Loaded):
            raise TuneError(f"{kernel.tile} was to be timed but is not on the card.")
        layer = self._layers[kernel.projection]
        calls = []
        for turn in range(self._launches(kernel.projection, tokens)):
            aligned = self._align(tokens, kernel.tile.block_m, turn)
            tensors = layer.launch_tensors(tokens, aligned, turn, in_order=reads_in_order(kernel))
            calls.append(self._launcher(loaded, tokens, tensors))
        return calls

    def look(self, kernel: Kernel, tokens: int, best: float) -> Timing:
        """Time a loaded kernel for one row in a first, short look.

        Args:
            best: the row's best time so far in microseconds; a kernel hopelessly slower is launched once only.
        """
        calls, hopeless = self._row_calls(kernel, tokens), HOPELESS * best + 10
        is_long = best > LONG_LAUNCH
        graph = None if is_long else self._clock.capture(calls)
        first = self._clock.time_calls(calls[:1], 1)[0] if graph is None else self._clock.replay([graph], 1)[0][0]
        if first > hopeless:
            return Timing(kernel, tokens, first, first, 1)
        replays = max(1, min(LOOK_REPLAYS, int(LOOK_BUDGET / (first * len(calls)))))
        times = self._clock.time_calls(calls, replays) if graph is None else self._clock.replay([graph], replays)[0]
        return Timing(kernel, tokens, statistics.median(times), min(times), replays)

    def time_together(self, kernels: Sequence[Kernel], tokens: int, replays: int) -> tuple[Timing, ...]:
        """Time loaded kernels for one row in turn, so that what the card's clock does meets all of them alike.

        Args:
            replays: of each; fewer where they take long, at least `FEWEST_TURNS`.
        """
        graphs = [self._kept_graph(kernel, tokens) for kernel in kernels]
        once = self._clock.replay(graphs, 1)
        round_us = sum(times[0] * graph.launches for times, graph in zip(once, graphs, strict=True))
        rounds = max(FEWEST_TURNS, min(replays, int(TURN_BUDGET * replays / round_us)))
        return tuple(
            Timing(kernel, tokens, statistics.median(times), min(times), replays)
            for kernel, times in zip(kernels, self._clock.replay(graphs, rounds), strict=True)
        )

    def _kept_graph(self, kernel: Kernel, tokens: int) -> Graph:
        """A row's graph; an even closer look may follow, so it is kept."""
        graph = self._graphs.pop((kernel, tokens), None) or self.row_graph(kernel, tokens)
        self._graphs[kernel, tokens] = graph
        while len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def duel(self, tokens: int, own: RowTiles | None, tuned: RowTiles) -> KernelDuel | Build:
        """Time two pairs in turn for one row, kernel by kernel.

        Returns:
            The duel, with `own` empty where SGLang's pair does not run here, and each kernel's median; the build that
            failed where the tuned pair does not run.
        """
        if own is not None and any(self.load(kernel).outcome is not Outcome.OK for kernel in own.kernels):
            own = None
        for build in map(self.load, tuned.kernels):
            if build.outcome is not Outcome.OK:
                return build
        kernels = list(dict.fromkeys([*(own.kernels if own else ()), *tuned.kernels]))
        graphs = [self.row_graph(kernel, tokens) for kernel in kernels]
        first = self._clock.replay(graphs, 1)
        rounds = rounds_for(sum(times[0] * graph.launches for times, graph in zip(first, graphs, strict=True)))
        times = dict(zip(kernels, self._clock.replay(graphs, rounds), strict=True))

        def sums(pair: RowTiles) -> tuple[float, ...]:
            return tuple(up + down for up, down in zip(*(times[kernel] for kernel in pair.kernels), strict=True))

        medians = {kernel: statistics.median(values) for kernel, values in times.items()}
        return KernelDuel(Duel(tokens, Via.KERNELS, sums(own) if own else (), sums(tuned)), medians)


def reads_in_order(kernel: Kernel) -> bool:
    """Whether a kernel's A lies in the sorted order: the down product's, where it loads through a descriptor."""
    return kernel.tile.use_tma and kernel.projection is Projection.DOWN


@contextmanager
def triton_cache(folder: Path) -> Iterator[None]:
    """Have Triton use a cache folder for what it compiles within the `with` statement."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before


def build_driver() -> None:
    """Have Triton build its CUDA helper (a second of the C compiler) before the first kernel waits for it."""
    from triton.runtime import driver

    driver.active.get_current_target()
