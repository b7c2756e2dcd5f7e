"""Artefacts for tests: what a tuning, or a plan, would have left for a model on a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fixer.artefacts.artefact import Artefact, Decision, RowChoice
from fixer.artefacts.environment import environment_of
from fixer.machine.cards import Card
from fixer.model.config import load_model
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.sglang.file_names import pairs_of_names
from fixer.sglang.flags import parse_flags
from fixer.sglang.tree import Tree
from fixer.workload import Tile
from tests.support.moe_rows import moe_row

RTX_4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 101376, 24564, 0, "580.159.03")
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 81559, 0, "580.159.03")
SMALL, LARGE = Tile(16, 64, 128, 1, 4, 4), Tile(64, 128, 64, 16, 8, 3)


def renamed(artefact: Artefact, **changes) -> Artefact:
    """The same with another workload or environment, and the file names that follow from them."""
    workload = changes.get("workload", artefact.workload)
    card = changes.get("environment", artefact.environment).card
    gate_up, down = pairs_of_names(workload, card)[0]
    return replace(artefact, files=(gate_up, down), **changes)


def artefact_of(tree: Tree, argv: Sequence[str], card: Card, *, measured: bool = True, **environment) -> Artefact:
    """An artefact for a server with those flags; keywords change its environment.

    From M = 64 on the down projection's tile differs from the gate-up's. Gains: 2 up to M = 8, 1.25 above.
    """
    flags = parse_flags(argv)
    model = load_model("", flags)
    decision = decide(model, flags, card, tree.version)
    lookup = tree.lookup(decision.workload, card)
    rows = ladder(flags, card, tree.version, decision.workload)

    def choice(row: int) -> RowChoice:
        up, down = (SMALL, SMALL) if row < 64 else (LARGE, replace(LARGE, block_n=64))
        if not measured:
            return moe_row(row, up, down, Decision.FITTING_ONLY)
        own = 10.0 * (2 if row <= 8 else 1.25)
        return moe_row(row, up, down, Decision.TUNED, 10.0, 10.0, own, own, 0.001)

    there = environment_of(tree, card if measured else replace(card, driver=""))
    return Artefact(
        environment=replace(there, **environment),
        model=model.name,
        revision="",
        workload=decision.workload,
        files=(lookup.gate_up, lookup.down),
        rows=tuple(choice(row) for row in rows),
        created="2026-11-23T22:58:01Z",
        seconds=30.0 if measured else 0.0,
        measured=measured,
    )
