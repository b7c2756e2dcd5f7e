"""A made-up result of `moefix bench --serve` around given loads."""

from __future__ import annotations

from fixer.bench.results import BenchEnvironment, BenchResult, Kind, ServeLoad

WHERE = BenchEnvironment(
    "NVIDIA X", (9, 0), "580.1", 232448, "0.5.17", "3.6.0", "2.11.0", "0.1", "3.12.3", "ab" * 32, 16
)


def result_of(*loads: ServeLoad) -> BenchResult:
    """A result with these loads, not judged as a whole."""
    return BenchResult(
        kind=Kind.SERVE,
        created="2026-11-24T06:50:00Z",
        environment=WHERE,
        model="m",
        revision="",
        artefact="E=8-0123.json",
        smem_limit=None,
        serve=loads,
    )
