"""`moefix export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fixer.base.data_folder import DataFolder
from fixer.base.errors import UsageError
from fixer.commands.common import PASS_THROUGH
from fixer.machine.signals import interruptible

if TYPE_CHECKING:
    from fixer.artefacts.artefact import Artefact
    from fixer.artefacts.forms import Form, Written

FORMS = ("artefact", "sglang", "vllm", "config-dir")


@click.command("export", context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="The kept tuning that this model's server uses.")
@click.option("--card", metavar="NAME", help="The kept tuning of this card, or of cards whose name has this in it.")
@click.option("--file", "source", metavar="FILE", type=click.Path(path_type=Path), help="An artefact's file.")
@click.option("--for", "planned", metavar="CARD", help='Not a kept tuning but the plan for a card ("RTX 4090").')
@click.option("--list", "listed", is_flag=True, help="List what is kept, and write nothing.")
@click.option("--as", "form", type=click.Choice(FORMS), default="artefact", show_default=True, help="What to write.")
@click.option("--out", metavar="PATH", help="The file (artefact; - for standard output) or folder to write.")
@click.option("--smem-limit", metavar="BYTES", type=int, help="--for: plan for less shared memory per block.")
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="An SGLang tree to use.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str | None,
    card: str | None,
    source: Path | None,
    planned: str | None,
    listed: bool,
    form: str,
    out: str | None,
    smem_limit: int | None,
    sglang_root: Path | None,
    home: Path | None,
    sglang_flags: tuple[str, ...],
) -> None:
    """Write a kept tuning as one file to take elsewhere, or as files that SGLang or vLLM reads.

    Without --file or --for it is looked for in the data folder: by --model with the server's SGLang flags, by --card.
    """
    from fixer.artefacts import transfer
    from fixer.artefacts.forms import Form
    from fixer.artefacts.shelf import kept_artefacts
    from fixer.base.data_folder import data_home

    if (source, planned).count(None) == 0:
        raise UsageError("--file and --for exclude each other", "Give one of them.")
    words = (*sglang_flags, *(() if model is None else (f"--model-path={model}",)))
    with interruptible():
        data = data_home(home)
        if source is not None:
            artefacts = transfer.artefacts_in(source)
            artefact = transfer.only_one(tuple((source, one) for one in artefacts))
        elif planned is not None:
            artefact = _plan(words, planned, smem_limit, sglang_root, data)
        else:
            kept, damaged = kept_artefacts(data)
            for one in damaged:
                click.echo(f"moefix: {one}", err=True)
            kept = transfer.for_card(kept, card) if card else kept
            if words:
                from fixer.model.config import load_model
                from fixer.sglang.flags import parse_flags

                flags = parse_flags(words)
                kept = transfer.for_model(kept, load_model("", flags), flags)
            if listed:
                click.echo(transfer.listing(kept, data) or f"nothing is kept in {data}")
                return
            artefact = transfer.only_one(kept)
        if out is None:
            raise UsageError(f"where is {transfer.describe(artefact)} to be written?", "Give --out PATH.")
        if out == "-":
            _print(artefact, form)
            return
        _report(_write(artefact, Form(form), Path(out), sglang_root, data))


def _plan(words: tuple[str, ...], name: str, limit: int | None, root: Path | None, data: Path) -> Artefact:
    from fixer.artefacts.environment import environment_of
    from fixer.kernel.cache import CompileCache
    from fixer.kernel.fit import compiler_for
    from fixer.machine.cards import find_card, with_shared_memory_limit
    from fixer.model.config import load_model
    from fixer.plan.make_plan import make_plan
    from fixer.plan.write import planned_artefact
    from fixer.sglang.declared import declared_of
    from fixer.sglang.find_tree import find_tree
    from fixer.sglang.flags import parse_flags

    tree = find_tree(str(root) if root else None, None, DataFolder(data).cache)
    flags = parse_flags(words, declared_of(tree, data))
    model = load_model("", flags)
    card = find_card(name) if limit is None else with_shared_memory_limit(find_card(name), limit)
    with CompileCache(data) as cache:
        plan = make_plan(model, flags, card, tree, compiler_for(tree, card, data, cache))
    for note in plan.notes:
        click.echo(f"moefix: {note}", err=True)
    return planned_artefact(plan, environment_of(tree, card))


def _print(artefact: Artefact, form: str) -> None:
    if form != "artefact":
        raise UsageError("only an artefact can go to standard output", "Give --out FOLDER.")
    click.echo(artefact.to_json(), nl=False)
    sys.stdout.flush()


def _write(artefact: Artefact, form: Form, out: Path, root: Path | None, data: Path) -> Written:
    from fixer.artefacts import forms

    if form is forms.Form.ARTEFACT:
        return forms.write_artefact(artefact, out, data)
    if form is forms.Form.SGLANG:
        return forms.write_sglang(artefact, out, data)
    if form is forms.Form.VLLM:
        return forms.write_vllm(artefact, out, data)
    tree = forms.tree_of(
        artefact.environment.sglang, root, DataFolder(data).cache, lambda line: click.echo(line, err=True)
    )
    return forms.write_config_dir(artefact, out, tree, data)


def _report(written: Written) -> None:
    for path in written.paths:
        click.echo(f"wrote {path}")
    for note in written.notes:
        click.echo(f"moefix: {note}", err=True)
