"""Search a recorded landscape under conditions that mimic other cards, shapes and formats, and tabulate the regret.

    python benchmarks/search_ablation.py

The shared recording is one card, shape and format. What else is out there is imitated: limits of other cards, seeds of
other formats or of few files, noisy times, other row sets, one projection, and landscapes tilted at random along every
axis and pair of axes (the optimum then lies where no seed knows it). Everything is seeded; two runs agree.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixer.base.data_folder import data_home
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.machine.cards import Card, find_card
from fixer.sglang.find_tree import find_tree
from fixer.sglang.releases import PINNED
from fixer.sglang.tree import TuningFile
from fixer.tuning.search.replay import Recorded, Recording, Regret, ReplayRunner
from fixer.tuning.search.runner import Look, More, Request, run_search
from fixer.tuning.search.search import Search
from fixer.tuning.search.seeds import seeds
from fixer.tuning.search.trials import Timing
from fixer.workload import Kernel, NumberFormat, Projection, Tile, Workload

LANDSCAPE = ROOT / "benchmarks/recordings/qwen3-30b-a3b-fp8-channel.h100.csv.gz"
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
H100 = find_card("H100")


@dataclass(frozen=True)
class Case:
    """One situation.

    Attributes:
        limit, column: shared memory in bytes and the column that it applies to.
        seeds_of: the workload whose seeds are taken.
        files: which shipped files may be seeds, by a name below.
        share: share of those files, drawn with `seed`.
        noise: standard deviation of the error of the times that the search sees.
        tilt: standard deviation of the random change along each value of each axis; half of it for each pair.
        rows: the least and the greatest M, and every how-manieth of them.
    """

    name: str
    limit: int | None = None
    column: str = "shared_bytes"
    seeds_of: Workload = QWEN
    files: str = "all"
    share: float = 1.0
    noise: float = 0.0
    tilt: float = 0.0
    seed: int = 0
    rows: tuple[int, int, int] = (1, 1 << 20, 1)
    projections: tuple[Projection, ...] = (Projection.GATE_UP, Projection.DOWN)
    shape_known: bool = True


SM89 = "shared_bytes_sm89"
BF16 = replace(QWEN, number_format=NumberFormat.NONE)
BLOCK = replace(QWEN, block_shape=(128, 128))
W8A16 = replace(QWEN, number_format=NumberFormat.INT8_W8A16)
UP_ONLY, DOWN_ONLY = (Projection.GATE_UP,), (Projection.DOWN,)


def cases() -> Iterator[Case]:
    yield Case("free")
    yield Case("free, shape unknown", shape_known=False)
    for limit in (51200, 65536, 101376):
        yield Case(f"{limit} bytes, sm_89", limit, SM89)
    yield Case("101376 bytes, sm_89, shape unknown", 101376, SM89, shape_known=False)
    for limit in (51200, 65536, 81920, 101376, 131072, 166912):
        yield Case(f"{limit} bytes, sm_90", limit)
    for seed in range(5):
        yield Case(f"half of the files, {seed}", share=0.5, seed=seed)
    for seed in range(3):
        yield Case(f"a tenth of the files, {seed}", share=0.1, seed=seed)
    yield Case("no Hopper files", files="no Hopper")
    yield Case("Triton 3.1 and 3.2 files", files="old")
    yield Case("bf16 seeds", seeds_of=BF16, files="bf16")
    yield Case("bf16 seeds, 101376 bytes, sm_89", 101376, SM89, seeds_of=BF16, files="bf16")
    yield Case("block FP8 seeds", seeds_of=BLOCK)
    yield Case("int8 weight-only seeds", seeds_of=W8A16, files="w8a16")
    yield Case("no seeds", files="none")
    for seed in range(3):
        yield Case(f"noise 0.3 %, {seed}", noise=0.003, seed=seed)
    yield Case("noise 1 %", noise=0.01)
    yield Case("M up to 64", rows=(1, 64, 1))
    yield Case("M from 256", rows=(256, 1 << 20, 1))
    yield Case("6 rows", rows=(1, 1 << 20, 3))
    yield Case("M = 1", rows=(1, 1, 1))
    yield Case("M = 4096", rows=(4096, 4096, 1))
    yield Case("up only", projections=UP_ONLY)
    yield Case("down only", projections=DOWN_ONLY)
    yield Case("down only, 101376 bytes, sm_89", 101376, SM89, projections=DOWN_ONLY)
    for seed in range(6):
        yield Case(f"tilted 3 %, {seed}", tilt=0.03, seed=seed)
    for seed in range(4):
        yield Case(f"tilted 8 %, {seed}", tilt=0.08, seed=seed)
    yield Case("tilted 3 %, 101376 bytes, sm_89", 101376, SM89, tilt=0.03, seed=9)


HOPPER = ("H100", "H200", "H20", "H800")


def chosen_files(case: Case, files: Sequence[TuningFile]) -> list[TuningFile]:
    """The case's files; never those of the recording's own card and shape."""
    draw = random.Random(case.seed)
    kept = [f for f in files if not (f.experts == 128 and f.intermediate == 768 and "H100" in f.device)]
    tests: dict[str, Callable[[TuningFile], bool]] = {
        "all": lambda f: True,
        "none": lambda f: False,
        "no Hopper": lambda f: not any(name in f.device for name in HOPPER),
        "old": lambda f: f.path.parent.name in ("triton_3_1_0", "triton_3_2_0"),
        "bf16": lambda f: f.number_format is NumberFormat.NONE,
        "w8a16": lambda f: f.number_format is NumberFormat.INT8_W8A16,
    }
    wanted = tests[case.files]
    return [f for f in kept if draw.random() < case.share and wanted(f)]


class Tilt:
    """Random factors for the values of each axis and for pairs of them, sliding from the smallest M to 8192."""

    def __init__(self, deviation: float, seed: int) -> None:
        self._deviation, self._draw = deviation, random.Random(seed)
        self._effects: dict[tuple[object, ...], tuple[float, float]] = {}

    def factors(self, kernel: Kernel) -> tuple[float, float]:
        """The logarithms of the factors at M = 1 and at M = 8192."""
        values = [(axis, getattr(kernel.tile, axis)) for axis in FUSED_MOE.axis]
        single = [self._effect(self._deviation, kernel.projection, value) for value in values]
        pairs = [self._effect(self._deviation / 2, kernel.projection, *pair) for pair in combinations(values, 2)]
        small, large = zip(*single, *pairs, strict=True)
        return sum(small), sum(large)

    def _effect(self, deviation: float, *key: object) -> tuple[float, float]:
        if key not in self._effects:
            self._effects[key] = self._draw.gauss(0, deviation), self._draw.gauss(0, deviation)
        return self._effects[key]


def landscape(case: Case, whole: Recording) -> Recording:
    """The part of the recording that a case is about, tilted if it says so."""
    first, last, every = case.rows
    rows = [tokens for tokens in whole.rows if first <= tokens <= last][::every]
    tilt = Tilt(case.tilt, case.seed)
    kernels = {}
    for kernel, recorded in whole.kernels.items():
        if kernel.projection in case.projections:
            small, large = tilt.factors(kernel)
            timings = {m: _scaled(recorded.timings[m], _slide(m, small, large)) for m in rows}
            kernels[kernel] = Recorded(kernel, timings, recorded.compile_seconds, recorded.limited_bytes)
    return Recording(kernels, case.limit)


def _slide(tokens: int, small: float, large: float) -> float:
    share = math.log2(tokens) / 13
    return math.exp(small * (1 - share) + large * share)


def _scaled(timing: Timing, factor: float) -> Timing:
    return replace(timing, microseconds=timing.microseconds * factor, least=timing.least * factor)


class NoisyRunner(ReplayRunner):
    """What the search sees is off by a little."""

    def __init__(self, recording: Recording, noise: float, seed: int) -> None:
        super().__init__(recording)
        self._noise, self._draw = noise, random.Random(seed)

    def look(self, requests: Sequence[Request], more: More | None = None) -> Iterator[Look]:
        for look in super().look(requests, more):
            noisy = (_scaled(timing, math.exp(self._draw.gauss(0, self._noise))) for timing in look.timings)
            yield replace(look, timings=tuple(noisy))


@dataclass(frozen=True)
class Result:
    name: str
    geomean: float
    worst: float
    kernels: int
    trials: int
    compile_seconds: float


def run(case: Case, files: Sequence[TuningFile], card: Card = H100) -> Result:
    whole = Recording.read(LANDSCAPE, case.limit, case.column)
    recording = landscape(case, whole)
    first = [tile for tile in seeds(chosen_files(case, files), case.seeds_of, card) if _is_plain(tile)]
    search = Search(QWEN, recording.rows, first, projections=recording.projections, shape_known=case.shape_known)
    runner = NoisyRunner(recording, case.noise, case.seed)
    run_search(search, runner)
    regret = Regret.of(search, recording)
    return Result(case.name, regret.geomean, regret.worst, search.asked, runner.trials, runner.compile_seconds)


def _is_plain(tile: Tile) -> bool:
    return all(getattr(tile, axis.name) in axis.values for axis in FUSED_MOE.axes)


def table(results: Iterable[Result]) -> Iterator[str]:
    """A Markdown table, with the mean of the cases last."""
    yield "| case | regret, geomean | worst row | kernels | looks | compile CPU s |"
    yield "| --- | --- | --- | --- | --- | --- |"
    seen = []
    for r in results:
        seen.append(r)
        yield f"| {r.name} | {r.geomean:.4f} | {r.worst:.4f} | {r.kernels} | {r.trials} | {r.compile_seconds:.0f} |"
    geomean = math.exp(sum(math.log(r.geomean) for r in seen) / len(seen))
    worst = sum(r.worst for r in seen) / len(seen)
    kernels, looks = sum(r.kernels for r in seen) // len(seen), sum(r.trials for r in seen) // len(seen)
    yield f"| mean of {len(seen)} | {geomean:.4f} | {worst:.4f} | {kernels} | {looks} | |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.parse_args()
    files = list(find_tree(None, PINNED, data_home() / "cache").shipped_files())
    for line in table(run(case, files) for case in cases()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
