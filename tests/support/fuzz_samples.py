"""An artefact, its environment and its layer, to be damaged in a thousand ways."""

from __future__ import annotations

from fixer.artefacts.artefact import Artefact, Decision, Environment
from fixer.workload import NumberFormat, Tile, Workload
from tests.support.moe_rows import moe_row

HERE = Environment("NVIDIA H100 80GB HBM3", (9, 0), 232448, "580.159.03", "3.6.0", "0.5.17", "ab" * 32, "0.1.0")


LAYER = Workload(8, 64, 128, 2, NumberFormat.FP8_W8A8, per_channel_quant=True)


SMALL, LARGE = Tile(16, 64, 128, 1, 4, 4), Tile(64, 128, 64, 16, 8, 3)


UP = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,per_channel_quant=True.json"


DOWN = UP.replace(".json", "_down.json")


ARTEFACT = Artefact(
    HERE,
    "owner/name",
    "c0ffee",
    LAYER,
    (UP, DOWN),
    tuple(
        moe_row(batch, tile, tile, Decision.TUNED, 9.0, 8.0, 12.0, 11.0, 0.001)
        for batch, tile in ((1, SMALL), (16, SMALL), (512, LARGE))
    ),
    "2026-11-23T22:58:01Z",
    31.5,
    measured=True,
)
