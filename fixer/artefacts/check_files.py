"""Looks at the tuning files that SGLang would read, before SGLang does: a bad one stops the server, or every request.

A file that cannot be used, or whose tiles overflow the card, is moved aside and reported. Where it cannot be moved it
is left out of what moefix looks at (`Tree.ignored`), and something else has to take its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.base.errors import StoreError
from fixer.base.files import Damaged, read_or_set_aside, set_aside, write_atomically
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome
from fixer.kernel.fit import complaint
from fixer.kernel.space import last_resorts
from fixer.machine.cards import Card
from fixer.sglang.lookup import BEFORE_MOEFIX, LookupStopsError
from fixer.sglang.own_choices import OwnChoice, own_choices
from fixer.sglang.tree import Lookup, Tree
from fixer.sglang.tuning_files import parse_table
from fixer.workload import Projection, Tile, Workload

CompileFunction = Callable[[Iterable[Candidate]], Mapping[Candidate, Compiled]]

MOST_FILES = 64
"""A look-up has two names in every Triton version's folder, so it comes to an end long before."""


@dataclass(frozen=True)
class Vetted:
    """What is left after a look at the files.

    Attributes:
        tree: SGLang's, with `ignored` naming the bad files that are still where they were.
        bad: what was found, for the caller to report.
        fits: whether SGLang's own choices fit the card for every M; None where nothing was compiled.
    """

    tree: Tree
    bad: tuple[Damaged, ...]
    fits: bool | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether SGLang would still read a bad file: something must be put in front of it."""
        return bool(self.tree.ignored)


def set_damaged_aside(tree: Tree, workload: Workload, card: Card) -> Vetted:
    """Move aside what SGLang would read for a workload and could not use: not JSON, wrong types, absurd tiles.

    What was there before moefix counts too. Compiles nothing.
    """
    bad: list[Damaged] = []
    for without_moefix in (False, True):
        for _ in range(MOST_FILES):
            damaged = _first_damaged(tree, workload, card, without_moefix)
            if damaged is None:
                break
            bad.append(damaged)
            if damaged.kept_as is None:
                tree = replace(tree, ignored=tree.ignored | {damaged.path})
            elif damaged.path.name.endswith(BEFORE_MOEFIX):
                # Without it moefix's own file would pass for SGLang's.
                with contextlib.suppress(StoreError):
                    write_atomically(damaged.path, b"")
    return Vetted(tree, tuple(bad))


def _first_damaged(tree: Tree, workload: Workload, card: Card, without_moefix: bool) -> Damaged | None:
    lookup = tree.lookup(workload, card, without_moefix=without_moefix)
    for path, tma in ((lookup.gate_up_path, tree.takes_gate_up_tma), (lookup.down_path, True)):
        if path is not None:
            _, damaged = read_or_set_aside(path, partial(parse_table, tma=tma))
            if damaged is not None:
                return damaged
    why = _stop(tree, lookup, workload, card)
    return set_aside(lookup.down_path, why) if why and lookup.down_path is not None else None


def _stop(tree: Tree, lookup: Lookup, workload: Workload, card: Card) -> str:
    """Why SGLang would stop at two files that are good each by itself; up to 0.5.12 they must agree in BLOCK_SIZE_M."""
    if lookup.down_path is None:
        return ""
    choose = own_choices(tree, lookup, workload, card)
    batches = sorted({*_batches(lookup.gate_up_path, lookup.down_path), workload.experts, workload.experts + 1})
    between = {(low + high) // 2 + step for low, high in pairwise(batches) for step in (0, 1)}
    try:
        for tokens in sorted({*batches, *between}):
            choose(tokens)
    except LookupStopsError as fault:
        return fault.message
    return ""


def vet(tree: Tree, workload: Workload, card: Card, rows: Iterable[int], compiler: CompileFunction) -> Vetted:
    """Move aside, besides, the running Triton's files whose tiles overflow the card or do not compile for it.

    Args:
        rows: the batch sizes M that the server runs.
        compiler: gives the shared memory of candidates; what it knows already costs nothing.

    Raises:
        MoefixError: nothing can be compiled here.
    """
    vetted = set_damaged_aside(tree, workload, card)
    tree, bad = vetted.tree, list(vetted.bad)
    rows = tuple(rows)
    for _ in range(MOST_FILES):
        faults = _misfits(tree, workload, card, rows, compiler)
        # A file in another Triton's folder may be right for that one: a pair in the running one's folder hides it.
        here = {path: why for path, why in faults.items() if path is not None and path.parent == tree.triton_folder}
        if not here:
            return Vetted(tree, tuple(bad), fits=not faults)
        for path, why in here.items():
            bad.append(set_aside(path, why))
            if bad[-1].kept_as is None:
                tree = replace(tree, ignored=tree.ignored | {path})
    return Vetted(tree, tuple(bad), fits=False)


def _misfits(
    tree: Tree, workload: Workload, card: Card, rows: tuple[int, ...], compiler: CompileFunction
) -> dict[Path | None, str]:
    """Where a tile comes from that does not run on the card (None: SGLang's default), and why."""
    lookup = tree.lookup(workload, card)
    choose = own_choices(tree, lookup, workload, card)
    own = {tokens: choose(tokens) for tokens in sorted({*rows, *_batches(lookup.gate_up_path, lookup.down_path)})}
    compiled = compiler(
        [Candidate(workload, projection, tile) for choice in own.values() for projection, tile, _ in _parts(choice)]
    )
    faults: dict[Path | None, str] = {}
    for tokens, choice in own.items():
        for projection, tile, source in _parts(choice):
            why = complaint(compiled[Candidate(workload, projection, tile)], card)
            if why:
                place = None if source == "default" else Path(source)
                faults.setdefault(place, f"its row for M = {tokens} ({tile}, {projection.value}) {why}")
    return faults


def misfit(artefact: Artefact, card: Card, compiler: CompileFunction) -> str:
    """The first of an artefact's tiles that does not run on the card, and why; "" where all do.

    Raises:
        MoefixError: nothing can be compiled here.
    """
    tiles = [
        (row.batch, Candidate(artefact.workload, projection, tile))
        for row in artefact.rows
        for projection, tile in ((Projection.GATE_UP, row.gate_up), (Projection.DOWN, row.down))
    ]
    compiled = compiler([candidate for _, candidate in tiles])
    for batch, candidate in tiles:
        result = compiled[candidate]
        if result.outcome in (CompileOutcome.DEADLINE, CompileOutcome.CRASHED):
            # The tile's fault, unless a small one does not compile here either.
            probe = Candidate(artefact.workload, Projection.GATE_UP, last_resorts(artefact.workload)[0])
            complaint(compiler([probe])[probe], card)
            why = f"cannot be compiled: {result.outcome.value}"
        else:
            why = complaint(result, card)
        if why:
            return f"its row for M = {batch} ({candidate.tile}, {candidate.projection.value}) {why}"
    return ""


def _batches(*paths: Path | None) -> set[int]:
    """Every row of some files: M between the rows of the ladder may come to any of them."""
    tables = (parse_table(path.read_bytes()) for path in paths if path is not None)
    return {batch for table in tables for batch in table}


def _parts(choice: OwnChoice) -> tuple[tuple[Projection, Tile, str], ...]:
    return (
        (Projection.GATE_UP, choice.gate_up, choice.gate_up_source),
        (Projection.DOWN, choice.down, choice.down_source),
    )
