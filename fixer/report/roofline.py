"""How near a measured time comes to what the card could do at best: its memory bandwidth and its matrix units."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from fixer.workload import NumberFormat


@dataclass(frozen=True)
class Peak:
    """A card's limits, as NVIDIA publishes them; None where it does not, or not for this number format.

    Attributes:
        bandwidth: of the card's memory, in bytes a second.
        half: dense matrix operations a second in bfloat16 (float16 on cards without it), accumulated in float32.
        fp8: the same in FP8.
        source: where the numbers are from.
    """

    bandwidth: float
    half: float | None
    fp8: float | None
    source: str

    def compute(self, number_format: NumberFormat) -> float | None:
        """Operations a second in the type that the products run in; None where that is not known."""
        match number_format:
            case NumberFormat.NONE | NumberFormat.INT4_W4A16 | NumberFormat.INT8_W8A16:
                return self.half
            case NumberFormat.FP8_W8A8:
                return self.fp8
        return None


@lru_cache(maxsize=1)
def _peaks() -> dict[str, Peak]:
    rows = json.loads(resources.files("fixer").joinpath("data/peaks.json").read_text("utf-8"))
    return {
        row["name"]: Peak(
            row["bandwidth_gbs"] * 1e9,
            row["half_tflops"] * 1e12 if "half_tflops" in row else None,
            row["fp8_tflops"] * 1e12 if "fp8_tflops" in row else None,
            row["source"],
        )
        for row in rows
    }


def peak_of(card: str) -> Peak | None:
    """The limits of a card by its driver's name (data/peaks.json), None for one whose limits are not known."""
    return _peaks().get(card)


@dataclass(frozen=True)
class Share:
    """Which fraction of the card's limits a time reaches; `compute` is None where that limit is not known."""

    memory: float
    compute: float | None


def share_of(work: tuple[float, float], microseconds: float, peak: Peak, number_format: NumberFormat) -> Share:
    """The shares that some work comes to: bytes to move and operations to compute, in so many microseconds."""
    moved, operations = work
    seconds = microseconds / 1e6
    most = peak.compute(number_format)
    return Share(moved / seconds / peak.bandwidth, operations / seconds / most if most else None)
