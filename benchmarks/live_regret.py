"""Tune on the card, then look further, and say how far the live run's choices are from the best that is then known.

An exhaustive sweep takes minutes; this looks at what most likely holds something better: every tile one or two steps
from a row's choice, then others of the space in random order, until the time is up. All that comes near a row's best,
the live run's choices among them, is timed again in turn, on one clock.

    python benchmarks/live_regret.py --seconds 45 --rows 1,16,3072 --out regret.json -- --model DIR [SGLANG FLAGS]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clean checkout needs no installation

from fixer.artefacts.artefact import Artefact
from fixer.base.data_folder import data_home
from fixer.base.progress import PlainLines
from fixer.families.fused_moe.rules import descriptor_projections
from fixer.kernel.space import Space
from fixer.serve.find_or_tune import importable_package
from fixer.serve.situation import look_around
from fixer.tuning.job import Job, Tuned
from fixer.tuning.measure.card_runner import CardRunner
from fixer.tuning.search.runner import Request, look_closer
from fixer.tuning.search.search import Limits, Search
from fixer.tuning.search.trials import Timing
from fixer.tuning.session import tune
from fixer.workload import BOTH, Kernel, Projection, RowTiles

CHUNK = 60
"""Kernels that are asked for at a time."""


def further(artefact: Artefact, space: Space, known: set[Kernel]) -> list[Kernel]:
    """Kernels that the live run left out, the most promising first."""
    near: dict[Kernel, None] = {}
    for row in artefact.rows:
        for projection, tile in ((Projection.GATE_UP, row.gate_up), (Projection.DOWN, row.down)):
            once = [one for _, one in space.steps(tile, projection)]
            near.update(dict.fromkeys(Kernel(projection, one) for one in once))
    for kernel in list(near):
        near.update(
            dict.fromkeys(Kernel(kernel.projection, one) for _, one in space.steps(kernel.tile, kernel.projection))
        )
    rest = [Kernel(projection, tile) for projection in BOTH for tile in space.all()]
    random.Random(2026).shuffle(rest)
    return [kernel for kernel in dict.fromkeys([*near, *rest]) if kernel not in known]


def yardstick(job: Job, tuned: Tuned, rows: tuple[int, ...], seconds: float) -> tuple[Search, int]:
    """A search that knows what the live run saw and what else could be seen in the time; and how much that was."""
    taken = job.tree.takes_descriptors if job.layer_package is not None else frozenset[Projection]()
    descriptors = descriptor_projections(job.workload, job.card.capability, taken)
    search = Search(job.workload, rows, (), limits=Limits(kernels=0), descriptors=descriptors)
    for timing in tuned.timings:
        if timing.tokens in rows:
            search.timed(replace(timing, replays=1))  # whatever is near is timed again, on the same clock as the rest
    known = {look.build.kernel for look in tuned.looks}
    kernels = further(tuned.artefact, Space(job.workload, descriptors), known)
    requests = [Request(k, tuple(search.sensible_rows(k.tile))) for k in kernels if search.sensible_rows(k.tile)]
    runner = CardRunner(
        job.workload,
        job.target,
        devices=[job.card.index or 0],
        rows=job.rows,
        shared_limit=job.card.shared_memory,
        folder=job.home / "cache" / "regret",
        descriptors=descriptors,
    )
    seen, chunks, end = 0, iter(range(0, len(requests), CHUNK)), time.monotonic() + seconds

    def more() -> list[Request]:
        at = next(chunks, None)
        return requests[at : at + CHUNK] if at is not None and time.monotonic() < end else []

    with runner:
        for look in runner.look(more(), more):
            seen += 1
            for timing in look.timings:
                search.timed(replace(timing, replays=1))
        for kernel, tokens in chosen_kernels(tuned.artefact, rows):
            # What was chosen is timed beside the others, whatever the card's clock was at its first look.
            others = [us for other, us in search.medians(tokens).items() if other.projection is kernel.projection]
            search.timed(Timing(kernel, tokens, min(others), min(others), 1))
        look_closer(search, runner)
    return search, seen


def chosen_kernels(artefact: Artefact, rows: tuple[int, ...]) -> list[tuple[Kernel, int]]:
    """Both kernels of each row that is judged."""
    pairs = [(row.tiles, row.batch) for row in artefact.rows if row.batch in rows]
    return [(kernel, batch) for pair, batch in pairs for kernel in pair.kernels]


def regret_of(search: Search, tokens: int, pair: RowTiles) -> float | None:
    """How many times longer a pair takes than the best of its kind: with descriptors or without, as the layer chose."""
    medians = search.medians(tokens)
    chosen = [medians.get(kernel) for kernel in pair.kernels]
    best = search.best_pairs(tokens, plain=not pair.use_tma)[0]
    return None if None in chosen else sum(us for us in chosen if us is not None) / best.microseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="for looking further")
    parser.add_argument("--rows", default="1,8,32,128,512,1536,3072,8192", help="batch sizes to judge")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    began, home = time.monotonic(), data_home(None)
    situation = look_around([flag for flag in options.flags if flag != "--"], home=home)
    here = situation.first
    workload = here.decision.workload
    assert workload is not None
    model, package = situation.model, importable_package(situation)
    job = Job(situation.tree, workload, here.cards, situation.rows(here), model.name, "", home, layer_package=package)
    tuned = tune(job, PlainLines())
    took = time.monotonic() - began
    rows = tuple(int(row) for row in options.rows.split(","))
    search, seen = yardstick(job, tuned, rows, options.seconds)
    regrets, missing = {}, []
    for row in tuned.artefact.rows:
        if row.batch in rows:
            value = regret_of(search, row.batch, row.tiles)
            if value is None:
                missing.append(row.batch)
            else:
                regrets[row.batch] = value
                best = " / ".join(map(str, search.best_pairs(row.batch)[0].tiles.values()))
                print(f"M={row.batch}: {value:.4f}, best of all {best}")
    result = {
        "model": model.name,
        "seconds_to_artefact": round(took, 1),
        "timeline": {name: round(value, 1) for name, value in tuned.timeline.items()},
        "live_kernels": len(tuned.looks),
        "further_kernels": seen,
        "regret": {str(row): round(value, 5) for row, value in regrets.items()},
        "geomean": round(math.exp(sum(map(math.log, regrets.values())) / len(regrets)), 5),
        "worst": round(max(regrets.values()), 5),
        "untimed": missing,
        "notes": tuned.notes,
        "artefact": json.loads(tuned.artefact.to_json()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "artefact"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
