"""The plan: what SGLang would run for a model on a card, whether it fits, and what to run in its place.

Nothing is measured and no GPU is needed: each kernel is compiled for the card, and the shared memory that the compiler
reports is what SGLang's launch will ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from fixer.families.registry import family_of
from fixer.kernel.cache import is_lasting, triton_version
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome
from fixer.kernel.fit import CompileFunction
from fixer.kernel.space import last_resorts
from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.case import Decision, Outcome
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.plan.plan import Plan, PlanRow, Source, Use
from fixer.plan.proposals import choose, offers
from fixer.sglang.declared import declared_of
from fixer.sglang.flags import ServerFlags
from fixer.sglang.own_choices import OwnChoice
from fixer.sglang.tree import Found, Lookup, Tree
from fixer.workload import BOTH, Projection, RowTiles, Tile, Workload

# --- making it -------------------------------------------------------------------------------------------------------


def make_plan(
    model: Model, flags: ServerFlags, card: Card, tree: Tree, compiler: CompileFunction | None = None
) -> Plan:
    """The plan for a model on a card.

    Args:
        tree: the SGLang that will serve.
        compiler: compiles for that card (`compiler_for`); None stops at the look-up: the rows then have no bytes.

    Raises:
        UsageError: parallel sizes that cannot go together.
        ModelError: the model's config makes no sense.
        SGLangError: the tree is not one that moefix knows, or a tuning file in it would stop SGLang.
        CompileError: Triton is not installed.
    """
    decision = decide(model, flags, card, tree.release, declared_of(tree))
    workload = decision.workload
    asks = decision.outcome in (Outcome.ASKS, Outcome.UNCERTAIN, Outcome.ASKS_THEN_CRASHES)
    lookup = tree.lookup(workload, card) if workload is not None and asks else None
    ladder_of: tuple[int, ...] = ()
    if workload is not None and decision.outcome is not Outcome.ASKS_THEN_CRASHES:
        ladder_of = ladder(flags, card, tree.release, workload)
    rows: tuple[PlanRow, ...] = ()
    if workload is not None and ladder_of:
        own = _own(tree, lookup, workload, card, ladder_of)
        rows = _looked_up(own) if compiler is None else _Planner(tree, workload, card, compiler).rows(own)
    compiled_with = triton_version() if rows and compiler is not None else ""
    notes = (*decision.notes, *_notes(decision, tree, rows, compiled_with))
    return Plan(model, card, tree.version, tree.triton, decision, lookup, rows, compiled_with, notes)


@dataclass(frozen=True)
class _Own:
    """What SGLang runs for one M, and from where."""

    source: Source
    pair: RowTiles


_SOURCES = {Found.SHIPPED: Source.SHIPPED, Found.OTHER_TRITON: Source.OTHER_TRITON, Found.NONE: Source.DEFAULT}


def _own(tree: Tree, lookup: Lookup | None, workload: Workload, card: Card, rows: Iterable[int]) -> dict[int, _Own]:
    if lookup is None:
        fixed = _both(tree.deterministic_tile(workload, card))
        return {tokens: _Own(Source.DETERMINISTIC, fixed) for tokens in rows}
    choose_own: Callable[[int], OwnChoice] = family_of(workload).own_choices(tree, lookup, workload, card)
    choices = {tokens: choose_own(tokens) for tokens in rows}
    source = _SOURCES[lookup.found]
    return {tokens: _Own(source, choice.tiles) for tokens, choice in choices.items()}


def _looked_up(own: Mapping[int, _Own]) -> tuple[PlanRow, ...]:
    """The rows without compiling anything."""
    return tuple(PlanRow(tokens, row.source, Use(row.pair.gate_up), Use(row.pair.down)) for tokens, row in own.items())


MOST_CRASHES = 8
"""After so many candidates that the compiler crashed on, with none that it did not, the others are not tried."""


class _NothingCompiles(Exception):  # noqa: N818 (never leaves this module)
    """The compiler crashed on all that it was given: trying more tiles says nothing about any."""


def _says_something(compiled: Compiled) -> bool:
    """Whether a result is about the tile: a crash, a full disk or want of memory is not."""
    return compiled.outcome is CompileOutcome.DEADLINE or is_lasting(compiled)


class _Planner:
    """Compiles what a plan needs and keeps what came of it."""

    def __init__(self, tree: Tree, workload: Workload, card: Card, compiler: CompileFunction) -> None:
        self._tree = tree
        self._workload = workload
        self._card = card
        self._compiler = compiler
        self._known: dict[Candidate, Compiled] = {}

    def rows(self, own: Mapping[int, _Own]) -> tuple[PlanRow, ...]:
        """The ladder's rows, compiled, each with a proposal where SGLang reads files and something fits."""
        reads_files = any(row.source is not Source.DETERMINISTIC for row in own.values())
        proposed: dict[int, RowTiles] = {}
        with suppress(_NothingCompiles):
            proposed = self._proposals(own) if reads_files else {}
        with suppress(_NothingCompiles):
            self._compile(row.pair for row in own.values())
        return tuple(
            PlanRow(
                tokens,
                row.source,
                self._use(Projection.GATE_UP, row.pair.gate_up),
                self._use(Projection.DOWN, row.pair.down),
                proposed.get(tokens),
            )
            for tokens, row in own.items()
        )

    def _proposals(self, own: Mapping[int, _Own]) -> dict[int, RowTiles]:
        """SGLang's own file where it fits, else what won elsewhere, else SGLang's default, else the smallest there is.

        SGLang's own and the first offers are compiled together, so that no core idles.
        """
        from_file = {tokens: _writable(row.pair) for tokens, row in own.items() if row.source is not Source.DEFAULT}
        self._compile(from_file.values())
        kept = {tokens: pair for tokens, pair in from_file.items() if self._fits(pair)}
        needy = [tokens for tokens in own if tokens not in kept]
        wanted = offers(tuple(self._tree.shipped_files()), self._workload, self._card, needy)
        defaults = [own[tokens].pair for tokens in needy]
        chosen = choose(wanted, lambda tiles: self._compile([*map(_both, tiles), *defaults]), self._tile_fits)
        pairs = kept | {tokens: _both(tile) for tokens, tile in chosen.items()}
        for tokens in needy:
            if tokens not in pairs and self._compiled_fits(_writable(own[tokens].pair)):
                pairs[tokens] = _writable(own[tokens].pair)
        return pairs | self._smallest([tokens for tokens in own if tokens not in pairs])

    def _smallest(self, rows: list[int]) -> dict[int, RowTiles]:
        """For rows that nothing else fits."""
        if not rows:
            return {}
        resorts = [_both(tile) for tile in last_resorts(self._workload)]
        self._compile(resorts)
        fitting = next((pair for pair in resorts if self._fits(pair)), None)
        return dict.fromkeys(rows, fitting) if fitting else {}

    def _compile(self, pairs: Iterable[RowTiles]) -> None:
        wanted = dict.fromkeys(candidate for pair in pairs for candidate in self._candidates(pair))
        missing = [candidate for candidate in wanted if candidate not in self._known]
        if missing:
            self._known.update(self._compiler(missing))
        if len(self._known) >= MOST_CRASHES and not any(map(_says_something, self._known.values())):
            raise _NothingCompiles

    def _candidates(self, pair: RowTiles) -> tuple[Candidate, Candidate]:
        up, down = (
            Candidate(self._workload, projection, tile)
            for projection, tile in zip(BOTH, (pair.gate_up, pair.down), strict=True)
        )
        return up, down

    def _compiled_fits(self, pair: RowTiles) -> bool:
        self._compile([pair])
        return self._fits(pair)

    def _fits(self, pair: RowTiles) -> bool:
        return all(self._use(candidate.projection, candidate.tile).fits for candidate in self._candidates(pair))

    def _tile_fits(self, tile: Tile) -> bool:
        return self._fits(_both(tile))

    def _use(self, projection: Projection, tile: Tile) -> Use:
        compiled = self._known[Candidate(self._workload, projection, tile)]
        if compiled.outcome is not CompileOutcome.OK:
            fits = False if _says_something(compiled) else None
            return Use(tile, None, fits, f"{compiled.outcome.value}: {compiled.message}")
        return Use(tile, compiled.shared_bytes, compiled.shared_bytes <= self._card.shared_memory)


def _writable(pair: RowTiles) -> RowTiles:
    """A pair that any release can read: USE_TMA in a gate-up file stops 0.5.17 (an argument its kernel lacks)."""
    return RowTiles(replace(pair.gate_up, use_tma=False), pair.down)


def _both(tile: Tile) -> RowTiles:
    """One tile for both projections: what shipped files without a down file of their own do."""
    return RowTiles(tile, tile)


# --- notes -----------------------------------------------------------------------------------------------------------


def _notes(decision: Decision, tree: Tree, rows: tuple[PlanRow, ...], compiled_with: str) -> tuple[str, ...]:
    faults = dict.fromkeys(
        f"SGLang's {use.tile} ({projection.value}) "
        + ("is not known to fit: the compiler failed" if use.crashed else "does not compile for this card")
        + f": {use.message}"
        for row in rows
        for projection, use in zip(BOTH, (row.gate_up, row.down), strict=True)
        if use.message
    )
    shapes = ", ".join(f"N={rows},K={columns}" for rows, columns in decision.dense_shapes)
    bare = [row.tokens for row in rows if compiled_with and row.proposed is None and not row.crash]
    notes = {
        tree.guess: tree.guess,
        f"SGLang also looks up files of the dense W8A8 block GEMMs ({shapes}), which moefix does not tune": shapes,
        "looked up only: nothing was compiled": rows and not compiled_with,
        f"compiled with Triton {compiled_with}; SGLang {tree.version} brings {tree.triton}, whose kernels may need "
        "another amount": compiled_with and compiled_with != tree.triton,
        f"nothing fits for M = {', '.join(map(str, bare))}": bare and decision.outcome is not Outcome.NO_LOOKUP,
    }
    return (*(text for text, holds in notes.items() if holds), *faults)
