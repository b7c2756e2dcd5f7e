"""`moefix import`."""

from __future__ import annotations

from pathlib import Path

import click

from fixer.base.data_folder import DataFolder
from fixer.machine.signals import interruptible


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--install", is_flag=True, help="Put the pair of files into SGLang's tree too.")
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="--install: into this SGLang tree.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
def command(*, files: tuple[Path, ...], install: bool, sglang_root: Path | None, home: Path | None) -> None:
    """Take tunings that `moefix export` (or `moefix tune --json`) wrote elsewhere into the data folder.

    A server uses one where the card, the driver's major version, SGLang, Triton and the kernel are the same.
    """
    from fixer.artefacts import transfer
    from fixer.base.data_folder import data_home
    from fixer.sglang.find_tree import find_tree

    with interruptible():
        artefacts = [artefact for path in files for artefact in transfer.artefacts_in(path)]
        data = data_home(home)
        root = str(sglang_root) if sglang_root else None
        tree = find_tree(root, None, DataFolder(data).cache, fetch=False) if install else None
        for artefact in artefacts:
            if tree is not None:
                transfer.check_tree(artefact.environment, tree)
                unchecked = transfer.check_fit(artefact, tree)
                if unchecked:
                    click.echo(f"moefix: whether it fits its card was not checked: {unchecked}", err=True)
        for artefact in artefacts:
            click.echo(f"kept {transfer.keep(artefact, data)}: {transfer.describe(artefact)}")
            if not artefact.measured:
                click.echo("moefix: it was not measured: a server uses it as it is; `moefix tune` measures", err=True)
            if tree is not None:
                installation = transfer.install_in(tree, artefact, data)
                click.echo(f"installed {installation}")
                for name, value in installation.env:
                    click.echo(f"moefix: start SGLang with {name}={value}", err=True)
