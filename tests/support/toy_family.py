"""A kernel family of another shape than the fused MoE kernel's: one product, other axes, another folder and names.

Importing this module registers it; a child process that unpickles a `ToyWorkload` imports it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fixer.base.json_reading import Reader, field_names
from fixer.families.family import Family
from fixer.families.registry import register
from fixer.machine.cards import Card
from fixer.sglang.lookup import BEFORE_MOEFIX
from fixer.sglang.own_choices import OwnChoice
from fixer.sglang.tree import Found, Lookup, Tree
from fixer.workload import AnyWorkload, Axis, NumberFormat, RowTiles, Tile

DEFAULT = Tile(16, 32, 128, num_warps=4, num_stages=2)
"""What the toy's SGLang runs where it finds no file."""

KERNEL = "import triton\n\n\n@triton.jit\ndef toy_kernel(a_ptr):\n    pass\n"


@dataclass(frozen=True)
class ToyWorkload(AnyWorkload):
    columns: int
    depth: int


class Toy(Family):
    name = "toy"
    layer = "toy product"
    kernels = "toy kernels"
    workload_type = ToyWorkload
    product_names = ("product",)
    phases = ("toy",)
    axes = (
        Axis("block_m", "TOY_M", (16, 32), 64, 16, is_power=True),
        Axis("block_n", "TOY_N", (16, 32, 64), 64, 16, is_power=True),
        Axis("block_k", "TOY_K", (128, 512, 1024), 1024, 16, is_power=True),
        Axis("num_warps", "toy_warps", (2, 4), 8, is_power=True),
        Axis("num_stages", "toy_stages", (1, 2, 3), 4, default=1, far=True),
    )
    kernel_names = ("toy_kernel",)

    def allows(self, tile: Tile, workload: ToyWorkload) -> bool:
        return workload.depth % tile.block_k == 0

    def block_rows(self, workload: ToyWorkload, tokens: int) -> float:
        return float(tokens)

    def element_bytes(self, workload: ToyWorkload) -> tuple[int, int]:
        return 1, 1

    def anchors(self, workload: ToyWorkload, block_m: int) -> Iterable[Tile]:
        return (Tile(block_m, 16, 128, num_warps=2, num_stages=1), Tile(block_m, 64, 128, num_warps=4, num_stages=1))

    def shipped_files(self, tree: Tree) -> Iterable[SimpleNamespace]:
        for path in sorted(self.folder(tree).glob("shipped-*.toy")):
            yield SimpleNamespace(rows=self.parser()(path.read_bytes()))

    def seed_weight(self, file: SimpleNamespace, workload: ToyWorkload, card: Card) -> float:
        return 1.0

    def is_related(self, workload: ToyWorkload, other: ToyWorkload) -> bool:
        return workload.depth == other.depth

    def folder(self, tree: Tree) -> Path:
        return tree.package / "elsewhere" / "toys"

    def folder_name(self, triton: str) -> str:
        return "elsewhere/toys"

    def lookup(self, tree: Tree, workload: ToyWorkload, card: Card, *, without_moefix: bool = False) -> Lookup:
        name = f"toy-{workload.columns}x{workload.depth}-{card.sglang_name}.json"
        path = self.folder(tree) / name
        if without_moefix and path.with_name(name + BEFORE_MOEFIX).exists():
            path = path.with_name(name + BEFORE_MOEFIX)
        there = path.exists() and path.stat().st_size > 0 and path not in tree.ignored
        found = Found.SHIPPED if there else Found.NONE
        return Lookup("elsewhere/toys", (name,), found, (path if there else None,))

    def own_choices(self, tree: Tree, lookup: Lookup, workload: ToyWorkload, card: Card) -> Callable[[int], OwnChoice]:
        (path,) = lookup.paths
        if path is None:
            return lambda tokens: OwnChoice(RowTiles(DEFAULT), ("default",))
        rows = {int(key): self.tile_of(row) for key, row in json.loads(path.read_text()).items()}
        nearest = lambda tokens: rows[min(rows, key=lambda key: abs(key - tokens))]  # noqa: E731
        return lambda tokens: OwnChoice(RowTiles(nearest(tokens)), (str(path),))

    def kernel_source(self, tree: Tree) -> Path:
        return tree.package / "toy_kernel.py"

    def kernel_name(self, workload: ToyWorkload) -> str:
        return "toy_kernel"

    def read_workload(self, reader: Reader) -> ToyWorkload:
        reader.only(field_names(ToyWorkload))
        return ToyWorkload(reader.whole("columns", 1), reader.whole("depth", 1))

    def label(self, workload: ToyWorkload) -> str:
        return f"toy-{workload.columns}x{workload.depth}"

    def facts(self, workload: ToyWorkload) -> list[tuple[str, str]]:
        return [("Toy columns", str(workload.columns)), ("Toy depth", str(workload.depth))]

    def number_format(self, workload: ToyWorkload) -> NumberFormat:
        return NumberFormat.FP8_W8A8

    def work(self, workload: ToyWorkload, tokens: int) -> tuple[float, float]:
        return float(workload.columns * workload.depth), 2.0 * tokens * workload.columns * workload.depth


TOY = register(Toy())
