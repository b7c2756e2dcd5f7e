"""Write what was measured as a recording, for replays without a card (format: benchmarks/recordings/README.md)."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from pathlib import Path

from fixer.base.files import write_atomically
from fixer.families.family import Family
from fixer.families.registry import UNNAMED
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Timing

MEASURED = ("us", "us_min", "rough", "shared_bytes", "regs", "spills", "compile_s", "USE_TMA")


def columns_of(family: Family) -> tuple[str, ...]:
    """The columns of a family's recording: product, M, the tile's axes, what was measured."""
    return ("phase", "M", *(axis.key for axis in family.axes), *MEASURED)


COLUMNS = columns_of(UNNAMED)
"""The fused MoE kernel's."""


def write_recording(path: Path, looks: Iterable[Look], timings: Iterable[Timing], family: Family = UNNAMED) -> int:
    """Write a gzipped CSV of every timed (kernel, row) of a family; how many there are.

    Raises:
        StoreError: it cannot be written.
    """
    builds = {look.build.kernel: look.build for look in looks}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns_of(family))
    phases = dict(zip(family.products, family.phases, strict=True))
    count = 0
    for timing in sorted(timings, key=lambda t: (t.kernel.projection.value, t.tokens, t.kernel.tile)):
        build, tile = builds[timing.kernel], timing.kernel.tile
        table.writerow(
            [
                phases[timing.kernel.projection],
                timing.tokens,
                *(getattr(tile, axis.name) for axis in family.axes),
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
