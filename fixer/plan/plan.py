"""The plan: what SGLang runs for each row, whether it fits, and what is proposed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from fixer.machine.cards import Card
from fixer.model.config import Model
from fixer.model.rules.case import Decision, Outcome
from fixer.sglang.tree import Lookup
from fixer.workload import NumberFormat, RowTiles, Tile, Workload

SCHEMA = 1


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
    COMPILER_CRASHED = "compiler_crashed"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True)
class Use:
    """One projection's configuration in one row.

    Attributes:
        tile: the configuration.
        shared_bytes: shared memory a block needs as compiled for the card; None where it was not compiled.
        fits: whether that is at most the card's; None where that is not known: nothing was compiled, or the compiler
            crashed. False where the tile does not compile.
        message: why it did not compile, "" where it did or was not tried.
    """

    tile: Tile
    shared_bytes: int | None = None
    fits: bool | None = None
    message: str = ""

    @property
    def crashed(self) -> bool:
        """Whether the compiler itself failed on it, which says nothing about the tile."""
        return self.fits is None and self.message != ""


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
    proposed: RowTiles | None = None

    @property
    def fits(self) -> bool | None:
        """Whether SGLang's own configuration fits for both projections; None where that is not known."""
        if False in (self.gate_up.fits, self.down.fits):
            return False
        return None if None in (self.gate_up.fits, self.down.fits) else True

    @property
    def crash(self) -> str:
        """What the compiler crashed with on one of the two, "" where it did not."""
        return next((use.message for use in (self.gate_up, self.down) if use.crashed), "")


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
        """Whether every row of SGLang's own fits; not applicable where nothing was compiled.

        One row that does not fit decides. Else a crash of the compiler leaves the others open.
        """
        if any(row.fits is False for row in self.rows):
            return Verdict.OUT_OF_RESOURCES
        if any(row.crash for row in self.rows):
            return Verdict.COMPILER_CRASHED
        if not self.rows or any(row.fits is None for row in self.rows):
            return Verdict.NOT_APPLICABLE
        return Verdict.FITS

    @property
    def crash(self) -> str:
        """What the compiler crashed with on SGLang's own configuration, "" where it did not."""
        return next((row.crash for row in self.rows if row.crash), "")

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
