"""Tunings to report on: the committed ones of an H200, made-up rows, a search in a journal, a benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Decision, RowChoice
from fixer.artefacts.shelf import save_artefact
from fixer.bench.passes import Latency, Load, Passes
from fixer.bench.results import BenchEnvironment, BenchResult, Kind, ServeLoad, Verdict
from fixer.bench.shelf import result_path, save_result
from fixer.tuning.journal import Journal, RunKey
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import BOTH, Kernel, Tile
from tests.support import fakes
from tests.support.moe_rows import moe_row

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200"
FP8 = RESULTS / "qwen3-30b-a3b-fp8-dynamic.artefact.json"
SMALL, LARGE = Tile(16, 64, 128, 1, 4, 4), Tile(64, 128, 64, 16, 8, 3)


def real(path: Path = FP8) -> Artefact:
    return Artefact.from_json(path.read_bytes())


def faster(batch: int, own: float = 100.0, tuned: float = 90.0, noise: float = 0.001) -> RowChoice:
    return moe_row(
        batch,
        SMALL,
        SMALL,
        Decision.TUNED,
        tuned / 2,
        tuned / 3,
        own / 2,
        own / 3,
        noise,
        layer_us=tuned,
        sglang_layer_us=own,
    )


def kept(batch: int, noise: float | None = 0.002) -> RowChoice:
    return moe_row(batch, LARGE, LARGE, Decision.KEPT_SGLANG, 50.0, 30.0, 50.0, 30.0, noise, 99.0, 99.0)


def cured(batch: int) -> RowChoice:
    """SGLang's own does not run: only the winner was timed."""
    return moe_row(batch, SMALL, SMALL, Decision.FITTING_ONLY, 50.0, 30.0, layer_us=99.0)


def unjudged(batch: int) -> RowChoice:
    """The finals could not time it."""
    return moe_row(batch, LARGE, LARGE, Decision.FITTING_ONLY)


def artefact_of(*rows: RowChoice, **changes) -> Artefact:
    return replace(real(), rows=rows, **changes)


def looks(rows=(1, 16, 128), count: int = 60) -> list[Look]:
    """A search's looks, in an order that is neither that of the tiles nor that of the projections."""
    tiles = [
        Tile(block_m, block_n, block_k, 1, warps, stages)
        for stages in (2, 4, 3)
        for warps in (8, 4)
        for block_k in (64, 128)
        for block_n in (128, 32, 64)
        for block_m in (32, 16)
    ][: count // 2]
    kernels = [Kernel(projection, tile) for tile in tiles for projection in BOTH]
    found = []
    for place, kernel in enumerate(kernels):
        if place % 10 == 7:
            found.append(Look(Build(kernel, Outcome.TOO_MUCH_SHARED_MEMORY, 300000)))
            continue
        times = tuple(Timing(kernel, m, us := fakes.microseconds(kernel, m), us * 0.99, 3) for m in rows)
        found.append(Look(Build(kernel, Outcome.OK, 4096 + 1024 * place, 64, 0), times))
    return found


def keep_looks(home: Path, artefact: Artefact, found: list[Look]) -> None:
    journal = Journal(home / "journal.sqlite", RunKey(artefact.environment, artefact.workload))
    for look in found:
        journal.write(look)
    journal.close()


def served(artefact: Artefact, name: str, created: str = "2026-11-24T01:00:00Z") -> BenchResult:
    """A made-up comparison of servers: faster by more than the layer can give, neutral, the same rows, no pass yet."""
    environment = artefact.environment
    where = BenchEnvironment(
        environment.card,
        environment.capability,
        environment.driver,
        environment.shared_memory,
        environment.sglang,
        environment.triton,
        "2.11.0",
        environment.moefix,
        "3.12.3",
        environment.kernel_hash,
        16,
    )
    latency = Latency(41.5, 77.25, (41.5, 41.5), (77.25, 77.25))

    def sides(own: float, tuned: float) -> tuple[Passes, Passes]:
        return (
            Passes((own,) * 4, (0, 3, 4, 7), latency, latency, (), 0),
            Passes((tuned,) * 4, (1, 2, 5, 6), latency, latency, (), 0),
        )

    loads = (
        ServeLoad(Load(16, 512, 128, 64), *sides(1330.0, 1398.0), False, 1.04, 1.05113, (1.039, 1.063), Verdict.FASTER),
        ServeLoad(Load(1, 512, 128, 4), *sides(230.3, 230.9), False, 1.08, 1.00261, (0.991, 1.014), Verdict.NEUTRAL),
        ServeLoad(Load(1, 4000, 1, 4), *sides(9.0, 9.9), True, 1.0, 1.1, (1.09, 1.11), Verdict.SAME),
        ServeLoad(Load(1, 8000, 1, 4)),
    )
    return BenchResult(
        kind=Kind.SERVE,
        created=created,
        environment=where,
        model=artefact.model,
        revision="",
        artefact=name,
        smem_limit=None,
        serve=loads,
        ratio=1.0266,
        interval=(1.017, 1.036),
        verdict=Verdict.FASTER,
        complete=True,
        notes=("the tokenizer is <b>there</b>",),
    )


def full_home(home: Path, **changes) -> Path:
    """A data folder in which a report finds everything that needs no compiler. Returns the artefact's file."""
    rows = (faster(1), faster(16, 200.0, 180.0), kept(64), kept(96, None), cured(128), unjudged(256))
    artefact = artefact_of(*rows, **changes)
    path = save_artefact(home, artefact)
    keep_looks(home, artefact, looks((1, 16, 64, 96, 128, 256), 120))
    result = served(artefact, path.name)
    save_result(result_path(home, result), result)
    return path
