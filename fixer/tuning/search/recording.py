"""Write what was measured as a recording, for replays without a card (format: benchmarks/recordings/README.md)."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from pathlib import Path

from fixer.base.files import write_atomically
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Timing
from fixer.workload import Projection

COLUMNS = (
    "phase",
    "M",
    "BLOCK_SIZE_M",
    "BLOCK_SIZE_N",
    "BLOCK_SIZE_K",
    "GROUP_SIZE_M",
    "num_warps",
    "num_stages",
    "us",
    "us_min",
    "rough",
    "shared_bytes",
    "regs",
    "spills",
    "compile_s",
    "USE_TMA",
)
PHASES = {Projection.GATE_UP: "up", Projection.DOWN: "down"}


def write_recording(path: Path, looks: Iterable[Look], timings: Iterable[Timing]) -> int:
    """Write a gzipped CSV of every timed (kernel, row); how many there are.

    Raises:
        StoreError: it cannot be written.
    """
    builds = {look.build.kernel: look.build for look in looks}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    count = 0
    for timing in sorted(timings, key=lambda t: (t.kernel.projection.value, t.tokens, t.kernel.tile)):
        build, tile = builds[timing.kernel], timing.kernel.tile
        table.writerow(
            [
                PHASES[timing.kernel.projection],
                timing.tokens,
                tile.block_m,
                tile.block_n,
                tile.block_k,
                tile.group_m,
                tile.num_warps,
                tile.num_stages,
                round(timing.microseconds, 2),
                round(timing.least, 2),
                int(timing.replays == 1),
                build.shared_bytes,
                build.registers,
                build.spills,
                round(build.compile_seconds, 3),
                int(tile.use_tma),
            ]
        )
        count += 1
    write_atomically(path, gzip.compress(text.getvalue().encode(), mtime=0))
    return count
