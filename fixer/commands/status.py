"""`moefix status`: what the moefix processes of a data folder do, and the health check of moefix's image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from fixer.base.data_folder import wanted_home
from fixer.base.status_reading import current_states, health, lines


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one object for each process.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
@click.option("--healthcheck", is_flag=True, help="Exit with 0 if this host's server answers /health, else with 1.")
def command(*, as_json: bool, home: Path | None, healthcheck: bool) -> int:
    """Say what a running moefix does: phase, progress, model, files, and what SGLang's log said of them."""
    folder = wanted_home(home, os.environ)
    if healthcheck:
        healthy, text = health(folder)
        click.echo(text)
        return 0 if healthy else 1
    found = current_states(folder)
    if as_json:
        click.echo(json.dumps([json.loads(status.to_json()) for status in found], indent=2))
    elif not found:
        click.echo(f"no moefix has run with {folder}")
    for number, status in enumerate(() if as_json else found):
        click.echo(("\n" if number else "") + "\n".join(lines(status)))
    return 0
