"""A pair of tuning files for the tests that install, read or export one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fixer.artefacts.install import TunedFiles
from fixer.families.fused_moe.family import FUSED_MOE
from fixer.workload import Tile

UP = "E=128,N=768,device_name=NVIDIA_GeForce_RTX_4090,dtype=fp8_w8a8,block_shape=[128, 128].json"
DOWN = UP.replace(".json", "_down.json")
SMALL, LARGE = Tile(16, 64, 128, 1, 4, 3), Tile(64, 128, 128, 16, 8, 2)


def moe_files(gate_up_name: str, down_name: str, gate_up: Mapping[int, Tile], down: Mapping[int, Tile]) -> TunedFiles:
    return TunedFiles(FUSED_MOE, (gate_up_name, down_name), (gate_up, down))


PAIR = moe_files(UP, DOWN, {64: LARGE, 1: SMALL}, {1: replace(SMALL, block_n=128), 64: replace(LARGE, use_tma=True)})
