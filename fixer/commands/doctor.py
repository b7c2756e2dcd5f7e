"""`moefix doctor`: what keeps SGLang or moefix from working here, and what to do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from fixer.commands.common import COMMANDS, PASS_THROUGH
from fixer.doctor.checks import BUILD_CHECKS, CHECKS
from fixer.doctor.examine import SCHEMA, Finding, Patient, State, examine, wished_home, worst


@click.command("doctor", short_help=COMMANDS["doctor"], context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="Also look at this model and its files.")
@click.option("--build", is_flag=True, help="The checks of an image being built: no card, no network.")
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="An SGLang tree to look at.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str | None,
    build: bool,
    sglang_root: Path | None,
    home: Path | None,
    as_json: bool,
    sglang_flags: tuple[str, ...],
) -> None:
    """Check this machine for what keeps SGLang or moefix from working; exit with 1 if there is a failure.

    Changes nothing. Each line says ok, warning or failure, and a warning or failure says what to do.
    """
    named = () if model is None else (f"--model-path={model}",)
    patient = Patient(wished_home(home), (*sglang_flags, *named), sglang_root)
    findings: list[Finding] = []
    for finding in examine(patient, BUILD_CHECKS if build else CHECKS):
        findings.append(finding)
        if not as_json and not sys.stdout.isatty():
            click.echo("\n".join(lines_of(finding)))
    if as_json:
        click.echo(json.dumps(as_object(findings), indent=2))
    elif sys.stdout.isatty():
        print_table(findings)
    sys.stdout.flush()
    # Without Python's own end, which may wait for a thread that hangs in the driver.
    os._exit(1 if worst(findings) is State.FAILURE else 0)


def as_object(findings: Sequence[Finding]) -> dict[str, object]:
    """What `--json` prints."""
    state = worst(findings).value
    return {"schema": SCHEMA, "state": state, "findings": [finding.to_json() for finding in findings]}


def lines_of(finding: Finding) -> Iterable[str]:
    """A finding in one or two plain lines."""
    yield f"{finding.state.value:<8} {finding.check}: {finding.text}"
    if finding.fix and finding.state is not State.OK:
        yield f"         -> {finding.fix}"


COLOURS = {State.OK: "green", State.WARNING: "yellow", State.FAILURE: "bold red"}


def print_table(findings: Iterable[Finding]) -> None:
    """The findings as a table, for a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "check", "finding"):
        table.add_column(heading)
    for finding in findings:
        told = Text(finding.text)
        if finding.fix and finding.state is not State.OK:
            told.append(f"\n→ {finding.fix}", "italic")
        table.add_row(Text(finding.state.value, COLOURS[finding.state]), Text(finding.check), told)
    Console().print(table)
