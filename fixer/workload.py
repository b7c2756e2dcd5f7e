"""The values that everything else speaks of: tile, projection, number format, workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Projection(Enum):
    """The matrix products that a kernel family has, each with a configuration file of its own.

    An MoE layer has two; a family with one product calls it ONLY.
    """

    GATE_UP = "gate_up"
    """Hidden states [M, hidden] times the experts' [2N, hidden] (one launch feeds each token to its top-k experts)."""
    DOWN = "down"
    """Activations [M * top_k, N] times the experts' [hidden, N], scaled by the routing weight."""
    ONLY = "only"
    """The product of a family that has one."""


class NumberFormat(Enum):
    """What SGLang puts behind `dtype=` in a file name; NONE (bf16, fp16) puts nothing there."""

    NONE = "none"
    FP8_W8A8 = "fp8_w8a8"
    INT8_W8A8 = "int8_w8a8"
    INT8_W8A16 = "int8_w8a16"
    INT4_W4A16 = "int4_w4a16"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class Axis:
    """One number of a tile that a family's kernel takes, and that its files name.

    Attributes:
        name: the field of `Tile`.
        key: the name in a row of SGLang's files.
        values: what the search tries, ascending.
        least, most: the smallest and largest value that makes sense at all, in a file that anybody may have written.
        default: the value where a row does not name the key; None where every row must name it.
        is_power: only powers of two are possible.
        far: every other value is one step away, not only the next: there are valleys along this axis.
    """

    name: str
    key: str
    values: tuple[int, ...]
    most: int
    least: int = 1
    default: int | None = None
    is_power: bool = False
    far: bool = False

    def checked(self, value: int) -> int:
        """The value itself.

        Raises:
            ValueError: it makes no sense.
        """
        if not self.least <= value <= self.most:
            raise ValueError(f"{self.name} is {value}, outside {self.least} to {self.most}")
        return value


MOE_AXES = (
    Axis("block_m", "BLOCK_SIZE_M", (16, 32, 64, 128, 256), 512, 16, is_power=True),
    Axis("block_n", "BLOCK_SIZE_N", (32, 64, 128, 256), 512, 16, is_power=True),
    Axis("block_k", "BLOCK_SIZE_K", (64, 128, 256), 1024, 16, is_power=True),
    Axis("group_m", "GROUP_SIZE_M", (1, 16, 32, 64), 4096, far=True),
    Axis("num_warps", "num_warps", (4, 8), 32, default=4, is_power=True),
    Axis("num_stages", "num_stages", (2, 3, 4, 5), 12, default=3, far=True),
)
"""The fused MoE kernel's. The values are SGLang's own tuning space (its tuning script's `get_configs_compute_bound`),
1920 configurations. Two axes are far: 128x128x128 with 4 warps gets slower from 3 stages to 4 and 1 % faster with 5, on
an H100 at M = 1536. SGLang's 827 shipped NVIDIA files stay at or below 256, 256, 256, 128, 16 and 8; the kernel's dot
product needs blocks of 16 at least; a thread block has 32 warps."""


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
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3
    use_tma: bool = False

    def to_json(self, axes: Sequence[Axis] = MOE_AXES) -> dict[str, int | bool]:
        """The row as SGLang's files of a family spell it."""
        row: dict[str, int | bool] = {axis.key: getattr(self, axis.name) for axis in axes}
        return row | {"USE_TMA": True} if self.use_tma else row

    @classmethod
    def from_json(cls, row: Mapping[str, Any], axes: Sequence[Axis] = MOE_AXES) -> Tile:
        """The tile of a row of a tuning file.

        Raises:
            ValueError: a key is missing, or a value is not a positive whole number of a sensible size.
        """
        values: dict[str, int] = {}
        for axis in axes:
            value = row.get(axis.key, axis.default)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 4096:
                raise ValueError(f"{axis.key} is {repr(value)[:40]}, not a whole number from 1 to 4096")
            values[axis.name] = value
        tma = row.get("USE_TMA", False)
        if not isinstance(tma, bool):
            raise ValueError(f"USE_TMA is {repr(tma)[:40]}, neither true nor false")
        for axis in axes:
            size = values[axis.name]
            if axis.is_power and size & (size - 1):
                raise ValueError(f"{axis.key} is {size}, not a power of two")
        return cls(**values, use_tma=tma)

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} group {self.group_m}, "
            f"{self.num_warps} warps, {self.num_stages} stages" + (", TMA" if self.use_tma else "")
        )


@dataclass(frozen=True)
class AnyWorkload:
    """What is tuned, of whatever kernel family; each family has its own kind (`fixer.families`)."""


@dataclass(frozen=True)
class Workload(AnyWorkload):
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


def check_tile(tile: Tile, axes: Sequence[Axis] = MOE_AXES) -> Tile:
    """The tile itself, if it makes sense for a kernel with these axes.

    Raises:
        ValueError: a part of it is absurd, such as a block of 4096, of 1 or of 48.
    """
    Tile.from_json(tile.to_json(axes), axes)
    for axis in axes:
        axis.checked(getattr(tile, axis.name))
    return tile


@dataclass(frozen=True, init=False)
class RowTiles:
    """The configurations of one row, one for each product of its family, in the order in which a layer runs them.

    `RowTiles(tile)` is a row of a family with one product, `RowTiles(gate_up, down)` one of an MoE layer.
    """

    tiles: tuple[Tile, ...]

    def __init__(self, *tiles: Tile) -> None:
        if len(tiles) not in PRODUCTS:
            raise ValueError(f"a row of {len(tiles)} tiles is no family's")
        object.__setattr__(self, "tiles", tiles)

    @property
    def products(self) -> tuple[Projection, ...]:
        """The products that the tiles are for."""
        return PRODUCTS[len(self.tiles)]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Each product with its tile."""
        return tuple(map(Kernel, self.products, self.tiles))

    def of(self, product: Projection) -> Tile:
        """One product's tile."""
        return self.tiles[self.products.index(product)]

    def __str__(self) -> str:
        return " / ".join(map(str, self.tiles))

    @property
    def use_tma(self) -> bool:
        """Whether one of them loads through tensor descriptors (SGLang's layer only: the sorting differs)."""
        return any(tile.use_tma for tile in self.tiles)

    @property
    def gate_up(self) -> Tile:
        """The gate-up projection's (an MoE layer only)."""
        return self.of(Projection.GATE_UP)

    @property
    def down(self) -> Tile:
        """The down projection's (an MoE layer only)."""
        return self.of(Projection.DOWN)


BOTH = (Projection.GATE_UP, Projection.DOWN)
"""The projections of an MoE layer in the order in which it runs them."""

PRODUCTS: Mapping[int, tuple[Projection, ...]] = {1: (Projection.ONLY,), 2: BOTH}
"""What a family with so many products calls them."""


@dataclass(frozen=True)
class Kernel:
    """One thing to compile: a tile for a projection."""

    projection: Projection
    tile: Tile
