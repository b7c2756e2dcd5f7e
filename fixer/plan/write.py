"""Write a plan's proposed files, with a note that they were not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fixer
from fixer.artefacts.artefact import Artefact, Decision, Environment, RowChoice
from fixer.artefacts.install import TunedFiles, write_beside
from fixer.base.errors import UsageError
from fixer.base.files import utc_now, write_together
from fixer.families.registry import family_of
from fixer.plan.plan import SCHEMA, Plan
from fixer.sglang.tree import Lookup

SIDECAR_SUFFIX = ".moefix-plan"
"""Ends the sidecar's name. SGLang and its tools read names that end in .json only."""


def write_plan(plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Write the proposed configurations under SGLang's exact file names, and a sidecar that says what they rest on.

    Returns:
        The files: one for each product that has one of its own, and the sidecar.

    Raises:
        UsageError: the plan proposes nothing for some row: a ladder with a gap would hand its M to a far row.
        StoreError: the folder cannot be written; no file is changed.
    """
    pairs = {row.tokens: row.proposed for row in plan.rows if row.proposed is not None}
    if plan.lookup is None or not pairs or len(pairs) != len(plan.rows):
        raise UsageError(f"there is no file to write for {plan.model.name} on {plan.card.name}", plan.decision.reason)
    assert plan.decision.workload is not None  # it has rows
    family = family_of(plan.decision.workload)
    files = list(TunedFiles.from_rows(family, plan.lookup.names, pairs, plan.sglang_version).files(folder))
    names = [path.name for path, _ in files]
    files.append((folder / sidecar_name(plan.lookup), _sidecar(plan, names)))
    if not files[-1][0].exists():  # without a sidecar what is there is not moefix's
        write_beside(files)
    else:
        write_together(files)
    return tuple(path for path, _ in files)


def sidecar_name(lookup: Lookup) -> str:
    """The sidecar's name: the first file's, with an ending that SGLang never reads."""
    return lookup.names[0].removesuffix(".json") + SIDECAR_SUFFIX


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


def planned_artefact(plan: Plan, environment: Environment) -> Artefact:
    """What a plan proposes, as an artefact that says that nothing was measured.

    Args:
        plan: a compiled one.
        environment: the tree's and the card's; its driver is left out, since nothing ran.

    Raises:
        UsageError: SGLang reads no file there, or the plan has a row without a proposal.
    """
    workload = plan.decision.workload
    rows = [(row.tokens, row.proposed) for row in plan.rows]
    if plan.lookup is None or workload is None or not rows or any(proposed is None for _, proposed in rows):
        raise UsageError(f"there is nothing to write for {plan.model.name} on {plan.card.name}", plan.decision.reason)
    if not all(plan.lookup.names):
        raise UsageError(f"SGLang {plan.sglang_version} reads one joint file for both projections")
    return Artefact(
        environment=replace(environment, driver=""),
        model=plan.model.name,
        revision=plan.model.revision or "",
        workload=workload,
        files=plan.lookup.names,
        rows=tuple(
            RowChoice(tokens, proposed, Decision.FITTING_ONLY) for tokens, proposed in rows if proposed is not None
        ),
        created=utc_now(),
        seconds=0.0,
        measured=False,
    )
