"""The plan: what SGLang would run for a model on a card, whether it fits, and what to run in its place.

Nothing is measured and no GPU is needed: each kernel is compiled for the card, and the shared memory that the compiler
reports is what SGLang's launch will ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import fixer
from fixer.kernel.cache import CompileCache, compile_with_cache, triton_version
from fixer.model.rules.decide import Decision, Outcome, decide
from fixer.base.errors import UsageError
from fixer.sglang.flags import ServerFlags
from fixer.machine.cards import Card
from fixer.artefacts.install import render_table
from fixer.kernel.compile import Candidate, CompileOutcome, Compiled, Target, read_kernel_source
from fixer.model.rules.ladder import ladder
from fixer.model.config import Model
from fixer.plan.proposals import choose, last_resorts, offers
from fixer.sglang.tree import Found, Lookup, OwnChoice, Tree, own_choices
from fixer.artefacts.shelf import check_file_name, utc_now, write_together
from fixer.tuning.duel import TilePair
from fixer.kernel.space import BOTH
from fixer.workload import NumberFormat, Projection, Tile, Workload

SCHEMA = 1

DETERMINISTIC_TILE = Tile(64, 64, 32, 8)
"""What `--enable-deterministic-inference` runs for every M (fused_moe_triton_config.py:72 of 0.5.17)."""

SIDECAR_SUFFIX = ".moefix-plan"
"""Ends the sidecar's name. SGLang and its tools read names that end in .json only."""

CompileFunction = Callable[[Iterable[Candidate]], Mapping[Candidate, Compiled]]
"""Gives a result for each candidate."""


class Source(Enum):
    """Where SGLang takes a row's configuration from."""

    SHIPPED = "shipped"
    OTHER_TRITON = "other_triton"
    DEFAULT = "default"
    DETERMINISTIC = "deterministic"


class Verdict(Enum):
    """Whether SGLang's own configurations can be launched on the card."""

    FITS = "fits"
    OUT_OF_RESOURCES = "out_of_resources"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True)
class Use:
    """One projection's configuration in one row.

    Attributes:
        tile: the configuration.
        shared_bytes: shared memory a block needs as compiled for the card; None where it was not compiled.
        fits: whether that is at most the card's; None where nothing was compiled, False where it does not compile.
        message: why it did not compile, "" where it did.
    """

    tile: Tile
    shared_bytes: int | None = None
    fits: bool | None = None
    message: str = ""


@dataclass(frozen=True)
class PlanRow:
    """One row of the ladder.

    Attributes:
        tokens: M.
        source: where SGLang takes the gate-up projection's configuration from.
        gate_up, down: what SGLang would run.
        proposed: what fits; None where nothing was compiled or nothing fits, or where SGLang reads no file.
    """

    tokens: int
    source: Source
    gate_up: Use
    down: Use
    proposed: TilePair | None = None

    @property
    def fits(self) -> bool | None:
        """Whether SGLang's own configuration fits for both projections; None where it was not compiled."""
        if self.gate_up.fits is None or self.down.fits is None:
            return None
        return self.gate_up.fits and self.down.fits


@dataclass(frozen=True)
class Plan:
    """What SGLang does with a model on a card.

    Attributes:
        model, card: whose plan it is.
        sglang_version, triton: SGLang's version, and the Triton that names its folder of tuning files.
        decision: whether SGLang asks for a file, and for which workload.
        lookup: the files' names and what SGLang finds; None where it looks nothing up.
        rows: the ladder's rows; empty where there is nothing to tune.
        compiled_with: the Triton that compiled here, "" where nothing was compiled.
        notes: what else a user should know, one sentence each.
    """

    model: Model
    card: Card
    sglang_version: str
    triton: str
    decision: Decision
    lookup: Lookup | None
    rows: tuple[PlanRow, ...]
    compiled_with: str
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether every row of SGLang's own fits; not applicable where nothing was compiled."""
        if not self.rows or any(row.fits is None for row in self.rows):
            return Verdict.NOT_APPLICABLE
        return Verdict.FITS if all(row.fits for row in self.rows) else Verdict.OUT_OF_RESOURCES

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints (README: the plan's JSON)."""
        return {
            "schema": SCHEMA,
            "model": {
                "name": self.model.name,
                "architecture": self.model.architecture,
                "is_moe": self.decision.outcome is not Outcome.NO_MOE,
            },
            "gpu": {
                "name": self.card.name,
                "sglang_name": self.card.sglang_name,
                "compute_capability": "{}.{}".format(*self.card.capability),
                "shared_memory_per_block_optin": self.card.shared_memory,
            },
            "sglang": {"version": self.sglang_version, "triton": self.triton},
            "outcome": self.decision.outcome.value,
            "kernel": self.decision.kernel,
            "reason": self.decision.reason,
            "workload": _workload_json(self.decision.workload),
            "lookup": _lookup_json(self.lookup),
            "rows": [_row_json(row) for row in self.rows],
            "verdict": self.verdict.value,
            "compiled_with": self.compiled_with or None,
            "notes": list(self.notes),
        }


# --- JSON ------------------------------------------------------------------------------------------------------------


def _workload_json(workload: Workload | None) -> dict[str, Any] | None:
    if workload is None:
        return None
    plain = workload.number_format is NumberFormat.NONE
    return {
        "E": workload.experts,
        "N": workload.intermediate,
        "hidden_size": workload.hidden_size,
        "top_k": workload.top_k,
        "dtype": None if plain else workload.number_format.value,
        "block_shape": list(workload.block_shape) if workload.block_shape else None,
        "per_channel_quant": workload.per_channel_quant,
        "tp_size": workload.tp_size,
        "ep_size": workload.ep_size,
    }


def _lookup_json(lookup: Lookup | None) -> dict[str, Any] | None:
    if lookup is None:
        return None
    return {
        "folder": lookup.folder,
        "gate_up": lookup.gate_up,
        "down": lookup.down or None,
        "found": lookup.found.value,
    }


def _row_json(row: PlanRow) -> dict[str, Any]:
    proposed = row.proposed
    return {
        "M": row.tokens,
        "source": row.source.value,
        "gate_up": _use_json(row.gate_up),
        "down": _use_json(row.down),
        "proposed": {
            "gate_up": proposed.gate_up.to_json() if proposed else None,
            "down": proposed.down.to_json() if proposed else None,
        },
    }


def _use_json(use: Use) -> dict[str, Any]:
    return {"config": use.tile.to_json(), "shared_bytes": use.shared_bytes, "fits": use.fits}


# --- making it -------------------------------------------------------------------------------------------------------


def compiler_for(tree: Tree, card: Card, home: Path, cache: CompileCache) -> CompileFunction:
    """A function that compiles SGLang's kernel for a card, asking the cache first.

    Args:
        tree: whose kernel.
        home: the data folder, for the cut-out kernel and Triton's own cache.
        cache: results of earlier plans.

    Raises:
        SGLangError: the tree has no kernel that moefix knows.
    """
    target = Target(read_kernel_source(tree.kernel_source), card.arch, home / "kernels")

    def compile_candidates(candidates: Iterable[Candidate]) -> Mapping[Candidate, Compiled]:
        return compile_with_cache(target, candidates, cache, home / "triton")

    return compile_candidates


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
    decision = decide(model, flags, card, tree.version)
    workload = decision.workload
    asks = decision.outcome in (Outcome.ASKS, Outcome.UNCERTAIN, Outcome.ASKS_THEN_CRASHES)
    lookup = tree.lookup(workload, card) if workload is not None and asks else None
    ladder_of: tuple[int, ...] = ()
    if workload is not None and decision.outcome is not Outcome.ASKS_THEN_CRASHES:
        ladder_of = ladder(flags, card, tree.version, workload)
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
    pair: TilePair


_SOURCES = {Found.SHIPPED: Source.SHIPPED, Found.OTHER_TRITON: Source.OTHER_TRITON, Found.NONE: Source.DEFAULT}


def _own(tree: Tree, lookup: Lookup | None, workload: Workload, card: Card, rows: Iterable[int]) -> dict[int, _Own]:
    if lookup is None:
        fixed = TilePair(DETERMINISTIC_TILE, DETERMINISTIC_TILE)
        return {tokens: _Own(Source.DETERMINISTIC, fixed) for tokens in rows}
    choose_own: Callable[[int], OwnChoice] = own_choices(tree, lookup, workload, card)
    choices = {tokens: choose_own(tokens) for tokens in rows}
    source = _SOURCES[lookup.found]
    pairs = {tokens: TilePair(choice.gate_up, choice.down) for tokens, choice in choices.items()}
    if lookup.down_path is None:
        # Without a file of its own the down projection runs the gate-up's row, less its USE_TMA (fused_moe.py:491-498).
        pairs = {tokens: replace(pair, down=replace(pair.down, use_tma=False)) for tokens, pair in pairs.items()}
    return {tokens: _Own(source, pair) for tokens, pair in pairs.items()}


def _looked_up(own: Mapping[int, _Own]) -> tuple[PlanRow, ...]:
    """The rows without compiling anything."""
    return tuple(PlanRow(tokens, row.source, Use(row.pair.gate_up), Use(row.pair.down)) for tokens, row in own.items())


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
        proposed = self._proposals(own) if reads_files else {}
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

    def _proposals(self, own: Mapping[int, _Own]) -> dict[int, TilePair]:
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

    def _smallest(self, rows: list[int]) -> dict[int, TilePair]:
        """For rows that nothing else fits."""
        if not rows:
            return {}
        resorts = [_both(tile) for tile in last_resorts(self._workload)]
        self._compile(resorts)
        fitting = next((pair for pair in resorts if self._fits(pair)), None)
        return dict.fromkeys(rows, fitting) if fitting else {}

    def _compile(self, pairs: Iterable[TilePair]) -> None:
        wanted = dict.fromkeys(candidate for pair in pairs for candidate in self._candidates(pair))
        missing = [candidate for candidate in wanted if candidate not in self._known]
        if missing:
            self._known.update(self._compiler(missing))

    def _candidates(self, pair: TilePair) -> tuple[Candidate, Candidate]:
        up, down = (
            Candidate(self._workload, projection, tile)
            for projection, tile in zip(BOTH, (pair.gate_up, pair.down), strict=True)
        )
        return up, down

    def _compiled_fits(self, pair: TilePair) -> bool:
        self._compile([pair])
        return self._fits(pair)

    def _fits(self, pair: TilePair) -> bool:
        return all(self._use(candidate.projection, candidate.tile).fits for candidate in self._candidates(pair))

    def _tile_fits(self, tile: Tile) -> bool:
        return self._fits(_both(tile))

    def _use(self, projection: Projection, tile: Tile) -> Use:
        compiled = self._known[Candidate(self._workload, projection, tile)]
        if compiled.outcome is not CompileOutcome.OK:
            return Use(tile, None, False, f"{compiled.outcome.value}: {compiled.message}")
        return Use(tile, compiled.shared_bytes, compiled.shared_bytes <= self._card.shared_memory)


def _writable(pair: TilePair) -> TilePair:
    """A pair that any release can read: USE_TMA in a gate-up file stops 0.5.17 (an argument its kernel lacks)."""
    return replace(pair, gate_up=replace(pair.gate_up, use_tma=False))


def _both(tile: Tile) -> TilePair:
    """One tile for both projections: what shipped files without a down file of their own do."""
    return TilePair(tile, tile)


# --- notes -----------------------------------------------------------------------------------------------------------


def _notes(decision: Decision, tree: Tree, rows: tuple[PlanRow, ...], compiled_with: str) -> tuple[str, ...]:
    faults = dict.fromkeys(
        f"SGLang's {use.tile} ({projection.value}) does not compile for this card: {use.message}"
        for row in rows
        for projection, use in zip(BOTH, (row.gate_up, row.down), strict=True)
        if use.message
    )
    shapes = ", ".join(f"N={rows},K={columns}" for rows, columns in decision.dense_shapes)
    bare = [row.tokens for row in rows if compiled_with and row.proposed is None]
    notes = {
        f"SGLang also looks up files of the dense W8A8 block GEMMs ({shapes}), which moefix does not tune": shapes,
        "looked up only: nothing was compiled": rows and not compiled_with,
        f"compiled with Triton {compiled_with}; SGLang {tree.version} brings {tree.triton}, whose kernels may need "
        "another amount": compiled_with and compiled_with != tree.triton,
        f"nothing fits for M = {', '.join(map(str, bare))}": bare and decision.outcome is not Outcome.NO_LOOKUP,
    }
    return (*(text for text, holds in notes.items() if holds), *faults)


# --- writing the proposed pair ---------------------------------------------------------------------------------------


def write_plan(plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Write the proposed configurations under SGLang's exact file names, and a sidecar that says what they rest on.

    Returns:
        The files: gate-up, down (where the release reads one), sidecar.

    Raises:
        UsageError: the plan proposes nothing for some row: a ladder with a gap would hand its M to a far row.
        StoreError: the folder cannot be written; no file is changed.
    """
    pairs = {row.tokens: row.proposed for row in plan.rows if row.proposed is not None}
    if plan.lookup is None or not pairs or len(pairs) != len(plan.rows):
        raise UsageError(f"there is no file to write for {plan.model.name} on {plan.card.name}", plan.decision.reason)
    gate_up = {tokens: pair.gate_up for tokens, pair in pairs.items()}
    down = {tokens: pair.down for tokens, pair in pairs.items()}
    files = [(folder / check_file_name(plan.lookup.gate_up), render_table(gate_up))]
    if plan.lookup.down:
        files.append((folder / check_file_name(plan.lookup.down), render_table(down)))
    names = [path.name for path, _ in files]
    files.append((folder / sidecar_name(plan.lookup), _sidecar(plan, names)))
    write_together(files)
    return tuple(path for path, _ in files)


def sidecar_name(lookup: Lookup) -> str:
    """The sidecar's name: the gate-up file's, with an ending that SGLang never reads."""
    return lookup.gate_up.removesuffix(".json") + SIDECAR_SUFFIX


def _sidecar(plan: Plan, names: list[str]) -> bytes:
    content = {
        "schema": SCHEMA,
        "what": "proposed by moefix: compiled for the card, not measured",
        "measured": False,
        "files": names,
        "model": plan.model.name,
        "card": plan.card.name,
        "compute_capability": "{}.{}".format(*plan.card.capability),
        "shared_memory_per_block_optin": plan.card.shared_memory,
        "sglang": plan.sglang_version,
        "triton": plan.triton,
        "compiled_with_triton": plan.compiled_with,
        "moefix": fixer.__version__,
        "date": utc_now(),
    }
    return (json.dumps(content, indent=4) + "\n").encode()
