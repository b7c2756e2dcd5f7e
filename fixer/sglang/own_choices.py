"""The configurations that SGLang would run without moefix, for each M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fixer.machine.cards import Card
from fixer.sglang.lookup import Chosen, World
from fixer.sglang.tree import Lookup, Tree, check_rows
from fixer.workload import Kernel, RowTiles, Tile, Workload


@dataclass(frozen=True)
class OwnChoice:
    """What SGLang runs for one M without moefix.

    Attributes:
        tiles: one for each product of the family.
        sources: where each comes from: "default" or a file's path.
    """

    tiles: RowTiles
    sources: tuple[str, ...]

    @property
    def parts(self) -> tuple[tuple[Kernel, str], ...]:
        """Each product's kernel, with its source."""
        return tuple(zip(self.tiles.kernels, self.sources, strict=True))

    @property
    def gate_up(self) -> Tile:
        """The gate-up projection's tile (an MoE layer only)."""
        return self.tiles.gate_up

    @property
    def down(self) -> Tile:
        """The down projection's tile (an MoE layer only)."""
        return self.tiles.down


def own_choices(tree: Tree, lookup: Lookup, workload: Workload, card: Card) -> Callable[[int], OwnChoice]:
    """SGLang's own configuration of both projections as a function of M, by its own functions.

    Args:
        lookup: the files to choose from, which need not be those that the tree finds.

    Raises:
        SGLangError: a file that SGLang would read cannot be used. From the function: where SGLang would stop.
    """
    files = dict(zip(lookup.names, lookup.paths, strict=True))
    for path in files.values():
        check_rows(path)
    asking = tree.own_lookup.ask(workload, World(card, tree.triton, Chosen(files), content=None))
    up_path, down_path = lookup.paths
    up_source = str(up_path or "default")
    down_source = str(down_path or up_source)

    def choose(tokens: int) -> OwnChoice:
        rows = asking.rows(tokens)
        up = Tile.from_json(rows.gate_up)
        down = replace(up, use_tma=False) if rows.down is None else Tile.from_json(rows.down)
        return OwnChoice(RowTiles(up, down), (up_source, down_source))

    return choose
