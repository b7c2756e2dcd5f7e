"""`moefix plan`: what SGLang would run on a card and whether it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fixer.base.errors import CompileError, UsageError
from fixer.commands.common import PASS_THROUGH, data_folder, wanted_cards, wanted_flags, wanted_tree
from fixer.machine.signals import interruptible

if TYPE_CHECKING:
    from fixer.machine.cards import Card
    from fixer.plan.plan import Plan
    from fixer.sglang.flags import ServerFlags
    from fixer.sglang.tree import Tree


@click.command("plan", context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="A folder, or OWNER/NAME on the hub.")
@click.option("--gpu", "gpus", metavar="NAME", multiple=True, help='A card by name ("RTX 4090"); default: those here.')
@click.option("--smem-limit", metavar="BYTES", type=int, help="Plan for less shared memory per block.")
@click.option("--sglang", "version", metavar="VERSION", help="An SGLang release, fetched from PyPI if need be.")
@click.option("--sglang-root", metavar="DIR", help="An SGLang package folder or source checkout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (an array for several cards).")
@click.option("--lookup-only", is_flag=True, help="Stop before compiling: file names and configurations, no bytes.")
@click.option("--write", "folder", metavar="DIR", help="Write the proposed pair of files there.")
@click.option("--home", metavar="DIR", help="The data folder; default: MOEFIX_HOME, else ~/.local/share/moefix.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str | None,
    gpus: tuple[str, ...],
    smem_limit: int | None,
    version: str | None,
    sglang_root: str | None,
    as_json: bool,
    lookup_only: bool,
    folder: str | None,
    home: str | None,
    sglang_flags: tuple[str, ...],
) -> None:
    """Say what SGLang would run for a model on a card, whether it fits, and what to run in its place.

    Needs no GPU: the kernel is compiled for the card. All other options are SGLang's own (--tp, --quantization, ...).
    """
    if folder is not None and lookup_only:
        raise UsageError("--write needs compiled configurations", "Leave out --lookup-only.")
    if version is not None and sglang_root is not None:
        raise UsageError("--sglang and --sglang-root exclude each other", "Give one of them.")
    named = () if model is None else (f"--model-path={model}",)
    with interruptible(), data_folder(home) as data:
        tree = wanted_tree(sglang_root, version, data)
        flags = wanted_flags((*sglang_flags, *named), tree, data)
        plans = _plans(flags, wanted_cards(gpus, smem_limit), tree, data, lookup_only)
        misfit = next((one for one in plans if one.decision.indivisible), None)
        if as_json or misfit is None:
            _print(plans, as_json)
        if misfit is not None:
            raise UsageError(misfit.decision.reason)
        crash = next((one.crash for one in plans if one.crash), "")
        if crash:
            raise CompileError(
                f"the compiler failed, so whether SGLang's own configuration fits is not known: {crash}",
                "Install the Triton that this SGLang brings, in a version that knows the card: moefix doctor.",
            )
        if folder is not None:
            _write(plans, Path(folder), quiet=as_json)


def _plans(flags: ServerFlags, cards: list[Card], tree: Tree, data: Path, lookup_only: bool) -> list[Plan]:
    from fixer.kernel.cache import CompileCache
    from fixer.kernel.fit import compiler_for
    from fixer.model.config import load_model
    from fixer.plan.make_plan import make_plan

    model = load_model("", flags)
    if lookup_only:
        return [make_plan(model, flags, card, tree) for card in cards]
    with CompileCache(data) as cache:
        plans = [make_plan(model, flags, card, tree, compiler_for(tree, card, data, cache)) for card in cards]
    for damaged in cache.damaged:
        click.echo(f"moefix: {damaged}", err=True)
    return _with_memory(plans, flags)


def _with_memory(plans: list[Plan], flags: ServerFlags) -> list[Plan]:
    """The plans with a note on each card whose memory is too small for the weights, or nearly."""
    from fixer.model.download.weight_bytes import weight_bytes
    from fixer.model.memory import FitOutcome, weights_fit

    size = None if flags.cpu_offload_gb else weight_bytes(plans[0].model, flags)
    if size is None:
        return plans
    fits = [weights_fit(size, p.card, flags.tp_size, flags.pp_size, fraction=flags.mem_fraction_static) for p in plans]
    short = (FitOutcome.DOES_NOT_FIT, FitOutcome.TIGHT)
    return [
        replace(plan, notes=(fit.sentence, *plan.notes)) if fit.outcome in short else plan
        for plan, fit in zip(plans, fits, strict=True)
    ]


def _print(plans: list[Plan], as_json: bool) -> None:
    if as_json:
        import json

        objects = [plan.to_json() for plan in plans]
        click.echo(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
        return
    from fixer.plan.view import print_plan

    for number, one in enumerate(plans):
        if number:
            click.echo()
        print_plan(one)


def _write(plans: list[Plan], folder: Path, quiet: bool) -> None:
    from fixer.plan.write import write_plan

    for one in plans:
        for path in write_plan(one, folder):
            click.echo(f"wrote {path}", err=quiet)
