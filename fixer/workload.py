"""The values that everything else speaks of: tile, projection, number format, workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Projection(Enum):
    """The two matrix products of an MoE layer, each with a configuration file of its own."""

    GATE_UP = "gate_up"
    """Hidden states [M, hidden] times the experts' [2N, hidden] (one launch feeds each token to its top-k experts)."""
    DOWN = "down"
    """Activations [M * top_k, N] times the experts' [hidden, N], scaled by the routing weight."""


class NumberFormat(Enum):
    """What SGLang puts behind `dtype=` in a file name; NONE (bf16, fp16) puts nothing there."""

    NONE = "none"
    FP8_W8A8 = "fp8_w8a8"
    INT8_W8A8 = "int8_w8a8"
    INT8_W8A16 = "int8_w8a16"
    INT4_W4A16 = "int4_w4a16"
    FLOAT32 = "float32"


@dataclass(frozen=True, order=True)
class Tile:
    """One configuration of the kernel: block sizes in elements, warps a block, software-pipelining stages.

    `num_warps` and `num_stages` default to Triton's own defaults, which is what the kernel runs with where SGLang's
    configuration names neither. `use_tma`: load both operands through tensor descriptors, which SGLang does only where
    a file of the down projection says so.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int = 4
    num_stages: int = 3
    use_tma: bool = False

    def to_json(self) -> dict[str, int | bool]:
        """The row as SGLang's files spell it."""
        row: dict[str, int | bool] = {
            "BLOCK_SIZE_M": self.block_m,
            "BLOCK_SIZE_N": self.block_n,
            "BLOCK_SIZE_K": self.block_k,
            "GROUP_SIZE_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return row | {"USE_TMA": True} if self.use_tma else row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Tile:
        """The tile of a row of a tuning file.

        Raises:
            ValueError: a key is missing, or a value is not a positive whole number of a sensible size.
        """
        values = []
        for key, fallback in (
            ("BLOCK_SIZE_M", None),
            ("BLOCK_SIZE_N", None),
            ("BLOCK_SIZE_K", None),
            ("GROUP_SIZE_M", None),
            ("num_warps", 4),
            ("num_stages", 3),
        ):
            value = row.get(key, fallback)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 4096:
                raise ValueError(f"{key} is {repr(value)[:40]}, not a whole number from 1 to 4096")
            values.append(value)
        tma = row.get("USE_TMA", False)
        if not isinstance(tma, bool):
            raise ValueError(f"USE_TMA is {repr(tma)[:40]}, neither true nor false")
        block_m, block_n, block_k, group_m, num_warps, num_stages = values
        tile = cls(block_m, block_n, block_k, group_m, num_warps, num_stages, use_tma=tma)
        for name, size in (("BLOCK_SIZE_M", tile.block_m), ("BLOCK_SIZE_N", tile.block_n)):
            if size & (size - 1):
                raise ValueError(f"{name} is {size}, not a power of two")
        if tile.block_k & (tile.block_k - 1) or tile.num_warps & (tile.num_warps - 1):
            raise ValueError("BLOCK_SIZE_K and num_warps must be powers of two")
        return tile

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} group {self.group_m}, "
            f"{self.num_warps} warps, {self.num_stages} stages" + (", TMA" if self.use_tma else "")
        )


@dataclass(frozen=True)
class Workload:
    """One shard's MoE layer, as SGLang's kernel sees it.

    Attributes:
        experts: E, the experts on this shard, fused shared experts included.
        intermediate: N as in the file name: the last dimension of w2 on this shard (for packed 4-bit weights half
            the layer's intermediate size).
        hidden_size: the model's hidden size, in elements.
        top_k: experts a token, fused shared experts included.
        number_format: the `dtype=` part of the file name.
        activation_dtype: "bfloat16", "float16" or "float32".
        block_shape: (block_n, block_k) of block-wise scales, else None.
        per_channel_quant: one weight scale for each output channel.
        group_size: group of 4-bit or 8-bit weight-only scales along K, 0 where there are none.
        has_zero_points: weight-only formats: the checkpoint has zero points.
        gated: gate and up are both there (2N wide), as with SwiGLU.
        tp_size, ep_size: tensor and expert parallel ranks.
    """

    experts: int
    intermediate: int
    hidden_size: int
    top_k: int
    number_format: NumberFormat = NumberFormat.NONE
    activation_dtype: str = "bfloat16"
    block_shape: tuple[int, int] | None = None
    per_channel_quant: bool = False
    group_size: int = 0
    has_zero_points: bool = False
    gated: bool = True
    tp_size: int = 1
    ep_size: int = 1


TILE_LIMITS = {"block_m": 512, "block_n": 512, "block_k": 1024, "group_m": 4096, "num_warps": 32, "num_stages": 12}
"""The largest value that makes sense in each part of a tile. SGLang's 827 shipped NVIDIA files stay at or below
256, 256, 256, 128, 16 and 8; the kernel's dot product needs blocks of 16 at least; a thread block has 32 warps."""


def check_tile(tile: Tile) -> Tile:
    """The tile itself, if it makes sense for the kernel.

    Raises:
        ValueError: a part of it is absurd, such as a block of 4096, of 1 or of 48.
    """
    Tile.from_json(tile.to_json())
    for name, most in TILE_LIMITS.items():
        least = 16 if name.startswith("block") else 1
        value = getattr(tile, name)
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}, outside {least} to {most}")
    return tile


@dataclass(frozen=True)
class TilePair:
    """The configurations of one row; they share BLOCK_SIZE_M."""

    gate_up: Tile
    down: Tile

    @property
    def kernels(self) -> tuple[Kernel, Kernel]:
        """The two kernels, gate-up first."""
        return Kernel(Projection.GATE_UP, self.gate_up), Kernel(Projection.DOWN, self.down)

    @property
    def use_tma(self) -> bool:
        """Whether one of them loads through tensor descriptors (SGLang's layer only: the sorting differs)."""
        return self.gate_up.use_tma or self.down.use_tma


BOTH = (Projection.GATE_UP, Projection.DOWN)
"""The projections in the order in which a layer runs them."""


@dataclass(frozen=True)
class Kernel:
    """One thing to compile: a tile for a projection."""

    projection: Projection
    tile: Tile
