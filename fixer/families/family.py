"""The contract of a kernel family: all that the rest of moefix may ask about a kernel that it tunes.

A family is one value. Search, journal, artefact, installing, report and plan speak to it and never to a kernel by name,
so that a new family is one more value in the registry (`fixer.families.registry`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixer.base.files import check_file_name
from fixer.machine.cards import Card
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.workload import PRODUCTS, AnyWorkload, Axis, NumberFormat, Projection, RowTiles, Tile, check_tile

if TYPE_CHECKING:
    from fixer.base.json_reading import Reader
    from fixer.sglang.own_choices import OwnChoice
    from fixer.sglang.tree import Lookup, Tree, TuningFile


class Family(ABC):
    """One kernel family.

    A workload is the family's own frozen dataclass (a subclass of `AnyWorkload`): one layer, or one product, on one
    shard. A row is M, the number of tokens of a forward; it has one tile for each of the family's products.

    Attributes:
        name: in artefacts and the journal.
        layer, kernels: what is tuned, for readers: "MoE layer", "MoE kernels".
        workload_type: the family's dataclass.
        product_names: what readers call each product, in the order in which a layer runs them.
        phases: what a recording calls each product.
        axes: the numbers of a tile that the kernel takes; the others keep `Tile`'s defaults.
        kernel_names: the `@triton.jit` functions, the first of which every SGLang has.
        overlay_variable: names the folder that takes the place of SGLang's tuning files; "" where there is none.
    """

    name: str
    layer: str
    kernels: str
    workload_type: type[AnyWorkload]
    product_names: tuple[str, ...]
    phases: tuple[str, ...]
    axes: tuple[Axis, ...]
    kernel_names: tuple[str, ...]
    overlay_variable: str = ""

    # ---- products and tiles

    @property
    def products(self) -> tuple[Projection, ...]:
        """The products, in the order in which a layer runs them."""
        return PRODUCTS[len(self.product_names)]

    def name_of(self, product: Projection) -> str:
        """What readers call a product."""
        return self.product_names[self.products.index(product)]

    @cached_property
    def axis(self) -> Mapping[str, Axis]:
        """Each axis by its name."""
        return {axis.name: axis for axis in self.axes}

    def row_of(self, tile: Tile) -> dict[str, int | bool]:
        """A tile as the family's files spell it."""
        return tile.to_json(self.axes)

    def tile_of(self, row: Any) -> Tile:
        """The tile of a row of one of the family's files.

        Raises:
            ValueError: it is none that makes sense.
        """
        if not isinstance(row, dict):
            raise ValueError("a tile is not an object")
        return Tile.from_json(row, self.axes)

    def check_tile(self, tile: Tile) -> Tile:
        """The tile itself.

        Raises:
            ValueError: a part of it is absurd.
        """
        return check_tile(tile, self.axes)

    def check_row(self, tiles: RowTiles, sglang: str = "") -> None:
        """Refuse a row that SGLang could not run.

        Args:
            sglang: the release that will read it; "" for any.

        Raises:
            ValueError: it has too few or too many tiles, or an absurd one.
        """
        del sglang
        if tiles.products != self.products:
            raise ValueError(f"{len(tiles.tiles)} tiles, and {self.name} has {len(self.products)} products")
        for tile in tiles.tiles:
            self.check_tile(tile)

    # ---- files

    def check_names(self, names: tuple[str, ...]) -> None:
        """Refuse file names that cannot be written: one for each product, "" where a product has no file of its own.

        Raises:
            ValueError: that does not hold.
        """
        given = [name for name in names if name]
        if len(names) != len(self.products) or not names[0]:
            raise ValueError(f"{len(given)} file names, and {self.name} has {len(self.products)} products")
        for name in given:
            check_file_name(name)
        if len(set(given)) != len(given):
            raise ValueError(f"several products are to be written as {given[0]}")

    def check_asked(self, workload: Any, card: str, names: tuple[str, ...]) -> None:
        """Refuse names that no SGLang asks for on a card, so that another model's file is never changed.

        Raises:
            ValueError: they are such.
        """
        del workload, card, names

    def render(self, table: Mapping[int, Tile]) -> bytes:
        """A file's content, from a tile for each M."""
        return render_table(table, self.axes)

    def parser(self, product: Projection | None = None, tree: Tree | None = None) -> Callable[[bytes], Any]:
        """Reads a file of a product strictly: bytes that anybody may have written to a tile for each M.

        Args:
            product: None for any.
            tree: the SGLang that will read the file; None for any release.
        """
        tma = product is None or self.may_describe(product, tree)
        return partial(parse_table, tma=tma, axes=self.axes)

    def may_describe(self, product: Projection, tree: Tree | None = None) -> bool:
        """Whether a file of a product may ask for tensor descriptors (USE_TMA)."""
        del product, tree
        return False

    def writable(self, tiles: RowTiles) -> RowTiles:
        """A row that every release can read from a file."""
        return tiles

    # ---- the space and the search

    def allows(self, tile: Tile, workload: Any) -> bool:
        """Whether a tile computes the right result for a workload."""
        del tile, workload
        return True

    def descriptors(self, tree: Tree, workload: Any, card: Card) -> frozenset[Projection]:
        """The products that are worth trying with tensor descriptors."""
        del tree, workload, card
        return frozenset()

    def makes_sense(self, tile: Tile, workload: Any, tokens: int) -> bool:
        """Whether a tile can be a good fit for M = `tokens`; what cannot is not timed."""
        del tile, workload, tokens
        return True

    @abstractmethod
    def block_rows(self, workload: Any, tokens: int) -> float:
        """Rows that a block of BLOCK_SIZE_M is filled from, on average, for M = `tokens`."""

    @abstractmethod
    def element_bytes(self, workload: Any) -> tuple[int, int]:
        """Bytes of an element of the activations and of the weights, as the kernel loads them."""

    @abstractmethod
    def anchors(self, workload: Any, block_m: int) -> Iterable[Tile]:
        """Plain tiles of one BLOCK_SIZE_M, where the seeds have none."""

    def shipped_files(self, tree: Tree) -> Iterable[Any]:
        """The tuning files of this family that SGLang ships, each with `rows` (a tile for each M)."""
        del tree
        return ()

    def seed_weight(self, file: TuningFile, workload: Any, card: Card) -> float:
        """What one win of a shipped file counts for a workload and a card; 0 for one of no use."""
        del file, workload, card
        return 0.0

    def same_tokens(self, file: TuningFile, workload: Any, tokens: int) -> float:
        """The M at which a shipped file's kernel does what the workload's does for M = `tokens`."""
        del file, workload
        return float(tokens)

    @abstractmethod
    def is_related(self, workload: Any, other: Any) -> bool:
        """Whether the winners of another workload of this family are worth trying."""

    # ---- SGLang

    @abstractmethod
    def folder(self, tree: Tree) -> Path:
        """Where SGLang looks first for the family's files; it need not exist."""

    @abstractmethod
    def folder_name(self, triton: str) -> str:
        """That folder below SGLang's or the overlay's root, for a Triton version: "configs/triton_3_6_0"."""

    def reads_overlay(self, tree: Tree) -> bool:
        """Whether that SGLang reads a folder that `overlay_variable` names."""
        del tree
        return False

    @abstractmethod
    def lookup(self, tree: Tree, workload: Any, card: Card, *, without_moefix: bool = False) -> Lookup:
        """The names that SGLang asks for, and what it finds.

        Args:
            without_moefix: as if moefix had never installed anything.
        """

    @abstractmethod
    def own_choices(self, tree: Tree, lookup: Lookup, workload: Any, card: Card) -> Callable[[int], OwnChoice]:
        """What SGLang runs without moefix, as a function of M."""

    def turning_points(self, workload: Any) -> tuple[int, ...]:
        """Every M at which SGLang's own choice changes though no file says so."""
        del workload
        return ()

    @abstractmethod
    def kernel_source(self, tree: Tree) -> Path:
        """The Python file with the kernel."""

    @abstractmethod
    def kernel_name(self, workload: Any) -> str:
        """The `@triton.jit` function in it that a workload runs."""

    # ---- words and records

    @abstractmethod
    def read_workload(self, reader: Reader) -> Any:
        """The workload in an artefact.

        Raises:
            ValueError: it is none.
        """

    @staticmethod
    def write_workload(workload: AnyWorkload) -> dict[str, Any]:
        """What `read_workload` reads."""
        return asdict(workload)

    @abstractmethod
    def label(self, workload: Any) -> str:
        """The workload in a few words without blanks or slashes, for a file name and a line."""

    def describe(self, workload: Any) -> str:
        """The workload in a line for a reader."""
        return self.label(workload)

    @abstractmethod
    def facts(self, workload: Any) -> list[tuple[str, str]]:
        """The workload for a reader: (name, value)."""

    @abstractmethod
    def number_format(self, workload: Any) -> NumberFormat:
        """The type that the products run in."""

    def work(self, workload: Any, tokens: int) -> tuple[float, float] | None:
        """The least that all products together move, in bytes, and compute, in operations; None where not known."""
        del workload, tokens
        return None
