"""`moefix report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("artefact", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="Where to; default: reports/ in the data folder."
)
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="The SGLang that was tuned for.")
@click.option("--no-compile", is_flag=True, help="Leave out shared memory that is not on record.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
def command(
    *, artefact: Path | None, out: Path | None, sglang_root: Path | None, no_compile: bool, home: Path | None
) -> None:
    """Write a tuning's report as one HTML page, and print its short form.

    ARTEFACT is the file of a tuning; by default the newest one in the data folder. Needs no GPU and no network.
    """
    from fixer.base.data_folder import data_home
    from fixer.report.make import choose, default_path, summary_of, write_report
    from fixer.report.terminal import print_report

    folder = data_home(home)
    chosen = choose(artefact, folder)
    for damaged in chosen.damaged:
        click.echo(f"moefix: {damaged}", err=True)
    summary = summary_of(chosen, folder, sglang_root=sglang_root, compiles=not no_compile)
    path = out.absolute() if out is not None else default_path(folder, chosen.path)
    write_report(summary, path, folder)
    print_report(summary)
    click.echo(f"\nreport   {path}")
