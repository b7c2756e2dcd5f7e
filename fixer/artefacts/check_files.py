"""Looks at the tuning files that SGLang would read, before SGLang does: a bad one stops the server, or every request.

A file that cannot be used, or whose tiles overflow the card, is moved aside and reported. Where it cannot be moved it
is left out of what moefix looks at (`Tree.ignored`), and something else has to take its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.base.errors import StoreError
from fixer.base.files import Damaged, read_or_set_aside, set_aside, write_atomically
from fixer.families.family import Family
from fixer.families.registry import family_of
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome
from fixer.kernel.fit import complaint
from fixer.kernel.space import last_resorts
from fixer.machine.cards import Card
from fixer.sglang.lookup import BEFORE_MOEFIX, LookupStopsError
from fixer.sglang.tree import Lookup, Tree
from fixer.workload import AnyWorkload, Kernel

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


def set_damaged_aside(tree: Tree, workload: AnyWorkload, card: Card) -> Vetted:
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


def _first_damaged(tree: Tree, workload: AnyWorkload, card: Card, without_moefix: bool) -> Damaged | None:
    family = family_of(workload)
    lookup = family.lookup(tree, workload, card, without_moefix=without_moefix)
    for product, path in zip(family.products, lookup.paths, strict=True):
        if path is not None:
            _, damaged = read_or_set_aside(path, family.parser(product, tree))
            if damaged is not None:
                return damaged
    why = _stop(tree, lookup, workload, card)
    last = lookup.paths[-1]
    return set_aside(last, why) if why and last is not None else None


def _stop(tree: Tree, lookup: Lookup, workload: AnyWorkload, card: Card) -> str:
    """Why SGLang would stop at files that are good each by itself; up to 0.5.12 two must agree in BLOCK_SIZE_M."""
    if len(lookup.paths) < 2 or lookup.paths[-1] is None:
        return ""
    family = family_of(workload)
    choose = family.own_choices(tree, lookup, workload, card)
    batches = sorted({*_batches(family, lookup), *family.turning_points(workload)})
    between = {(low + high) // 2 + step for low, high in pairwise(batches) for step in (0, 1)}
    try:
        for tokens in sorted({*batches, *between}):
            choose(tokens)
    except LookupStopsError as fault:
        return fault.message
    return ""


def vet(tree: Tree, workload: AnyWorkload, card: Card, rows: Iterable[int], compiler: CompileFunction) -> Vetted:
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
        here = {
            path: why
            for path, why in faults.items()
            if path is not None and path.parent == family_of(workload).folder(tree)
        }
        if not here:
            return Vetted(tree, tuple(bad), fits=not faults)
        for path, why in here.items():
            bad.append(set_aside(path, why))
            if bad[-1].kept_as is None:
                tree = replace(tree, ignored=tree.ignored | {path})
    return Vetted(tree, tuple(bad), fits=False)


def _misfits(
    tree: Tree, workload: AnyWorkload, card: Card, rows: tuple[int, ...], compiler: CompileFunction
) -> dict[Path | None, str]:
    """Where a tile comes from that does not run on the card (None: SGLang's default), and why."""
    family = family_of(workload)
    lookup = family.lookup(tree, workload, card)
    choose = family.own_choices(tree, lookup, workload, card)
    own = {tokens: choose(tokens) for tokens in sorted({*rows, *_batches(family, lookup)})}

    def candidate(kernel: Kernel) -> Candidate:
        return Candidate(workload, kernel.projection, kernel.tile)

    compiled = compiler([candidate(kernel) for choice in own.values() for kernel, _ in choice.parts])
    faults: dict[Path | None, str] = {}
    for tokens, choice in own.items():
        for kernel, source in choice.parts:
            why = complaint(compiled[candidate(kernel)], card)
            if why:
                place = None if source == "default" else Path(source)
                faults.setdefault(place, f"its row for M = {tokens} ({kernel.tile}, {kernel.projection.value}) {why}")
    return faults


def misfit(artefact: Artefact, card: Card, compiler: CompileFunction) -> str:
    """The first of an artefact's tiles that does not run on the card, and why; "" where all do.

    Raises:
        MoefixError: nothing can be compiled here.
    """
    tiles = [
        (row.batch, Candidate(artefact.workload, kernel.projection, kernel.tile))
        for row in artefact.rows
        for kernel in row.tiles.kernels
    ]
    compiled = compiler([candidate for _, candidate in tiles])
    for batch, candidate in tiles:
        result = compiled[candidate]
        if result.outcome in (CompileOutcome.DEADLINE, CompileOutcome.CRASHED):
            # The tile's fault, unless a small one does not compile here either.
            probe = Candidate(artefact.workload, artefact.family.products[0], last_resorts(artefact.workload)[0])
            complaint(compiler([probe])[probe], card)
            why = f"cannot be compiled: {result.outcome.value}"
        else:
            why = complaint(result, card)
        if why:
            return f"its row for M = {batch} ({candidate.tile}, {candidate.projection.value}) {why}"
    return ""


def _batches(family: Family, lookup: Lookup) -> set[int]:
    """Every row of the files: M between the rows of the ladder may come to any of them."""
    tables = (family.parser()(path.read_bytes()) for path in lookup.paths if path is not None)
    return {batch for table in tables for batch in table}
