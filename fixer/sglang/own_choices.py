"""The configurations that SGLang would run without moefix, for each M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fixer.base.errors import SGLangError
from fixer.machine.cards import Card
from fixer.sglang.tree import Lookup, Tree
from fixer.sglang.tuning_files import nearest_row, read_rows
from fixer.workload import Tile, Workload


@dataclass(frozen=True)
class OwnChoice:
    """What SGLang runs for one M without moefix, and where it comes from ("default" or a file's path)."""

    gate_up: Tile
    down: Tile
    gate_up_source: str
    down_source: str


def own_choices(tree: Tree, lookup: Lookup, workload: Workload, card: Card) -> Callable[[int], OwnChoice]:
    """SGLang's own configuration of both projections as a function of M (CFG:264-341).

    The files are read once. The down projection's BLOCK_SIZE_M is forced to the gate-up's, since both share one
    sorting of tokens; a missing down file means the gate-up file's rows.

    Raises:
        SGLangError: a file that SGLang would read cannot be used.
    """
    up_rows = _usable_rows(lookup.gate_up_path)
    down_rows = _usable_rows(lookup.down_path)

    def choose(tokens: int) -> OwnChoice:
        up, up_source = tree.default_tile(workload, card, tokens), "default"
        if up_rows is not None:
            up, up_source = nearest_row(up_rows, tokens), str(lookup.gate_up_path)
        # Without a file of its own the down projection reuses the gate-up's row, but never its TMA (CFG:142-161).
        down, down_source = replace(up, use_tma=False), up_source
        if down_rows is not None:
            chosen = nearest_row(down_rows, tokens)
            down, down_source = replace(chosen, block_m=up.block_m), str(lookup.down_path)
        return OwnChoice(up, down, up_source, down_source)

    return choose


def _usable_rows(path: Path | None) -> dict[int, Tile] | None:
    if path is None:
        return None
    try:
        return read_rows(path)
    except ValueError as error:
        raise SGLangError(
            f"SGLang would read {path} and fail: {error}.", "Move that file away, or tune again with --fresh."
        ) from error
