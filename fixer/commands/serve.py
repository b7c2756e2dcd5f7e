"""`moefix serve`: tune what is not yet tuned, then become the server."""

from __future__ import annotations

import click

from fixer.commands.common import DEFAULT_COMMAND, PASS_THROUGH, report_after_tuning
from fixer.machine.signals import interruptible


@click.command(DEFAULT_COMMAND, context_settings={**PASS_THROUGH, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(*, arguments: tuple[str, ...]) -> None:
    """Tune what is not yet tuned, then become the SGLang server with exactly these flags.

    moefix's own options: --moefix-skip-tune, --moefix-skip-download, --moefix-fresh, --moefix-strict, --moefix-quiet,
    --moefix-dry-run, --moefix-ask, --moefix-smem-limit BYTES, --moefix-home DIR, --moefix-sglang-root DIR, each also as
    a variable (MOEFIX_HOME ...).
    """
    from fixer.serve.serve import serve

    with interruptible():
        serve(arguments, report_after_tuning)
