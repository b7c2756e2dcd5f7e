"""Rows of an artefact of the fused MoE family, written as its JSON has them."""

from __future__ import annotations

from fixer.artefacts.artefact import Decision, RowChoice
from fixer.workload import RowTiles, Tile


def moe_row(
    batch: int,
    gate_up: Tile,
    down: Tile,
    decision: Decision,
    gate_up_us: float | None = None,
    down_us: float | None = None,
    sglang_gate_up_us: float | None = None,
    sglang_down_us: float | None = None,
    noise: float | None = None,
    layer_us: float | None = None,
    sglang_layer_us: float | None = None,
) -> RowChoice:
    own = (sglang_gate_up_us, sglang_down_us)
    return RowChoice(
        batch, RowTiles(gate_up, down), decision, (gate_up_us, down_us), own, noise, layer_us, sglang_layer_us
    )
