"""What several commands share: the table of commands, and how they find cards, tree and data folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fixer.base.data_folder import DataFolder
from fixer.base.errors import CardError

if TYPE_CHECKING:
    from fixer.artefacts.artefact import Artefact
    from fixer.machine.cards import Card
    from fixer.sglang.flags import ServerFlags
    from fixer.sglang.tree import Tree


DEFAULT_COMMAND = "serve"
"""Runs where the first word is an option: `moefix --model X [any SGLang flag]`."""


PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of a command that takes SGLang's flags besides its own."""


COMMANDS = {
    "bake": "Build a ready-tuned image for one model and one kind of card.",
    "bench": "Time SGLang's own configurations against the tuned ones.",
    "doctor": "Check this machine for what keeps SGLang or moefix from working.",
    "export": "Write a kept tuning as one file, or as files that SGLang or vLLM reads.",
    "import": "Take a tuning that was exported elsewhere into the data folder.",
    "plan": "Say what SGLang would run on a card, and whether it fits.",
    "report": "Write a tuning's report, and print its short form.",
    "serve": "Tune what is not yet tuned, then become the server.",
    "status": "Say what a running moefix does.",
    "tune": "Measure on this machine's cards and install, without a server.",
}
"""Every command with its short help. Each lies in a module of its own that is imported when it is called: `bake` is
`command` in fixer/commands/bake.py (`import` in import_.py), so that listing them imports nothing."""


def shortened(text: str) -> str:
    """A user's text in quotes, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def wanted_cards(names: tuple[str, ...], limit: int | None) -> list[Card]:
    """The cards to plan for, one of each kind: those named, else those that the driver shows.

    Raises:
        CardError: no such card is known, or none is named and none is visible.
    """
    from fixer.machine.cards import find_card, kinds, with_shared_memory_limit
    from fixer.machine.driver import visible_cards

    cards = [find_card(name) for name in names] or list(visible_cards())
    if not cards:
        raise CardError("no NVIDIA card is visible here", 'Name one to plan for: --gpu "RTX 4090".')
    if limit is not None:
        cards = [with_shared_memory_limit(card, limit) for card in cards]
    return [group[0] for group in kinds(cards)]


@contextlib.contextmanager
def data_folder(chosen: str | None) -> Iterator[Path]:
    """The data folder; where the default one cannot be written, a passing one, since a plan can do without.

    Raises:
        StoreError: the folder that the user chose cannot be written.
    """
    from fixer.base.data_folder import data_home
    from fixer.base.errors import StoreError

    try:
        home = data_home(Path(chosen) if chosen else None)
    except StoreError as fault:
        if chosen:
            raise
        click.echo(f"moefix: {fault.message}; nothing is kept for the next time", err=True)
        with tempfile.TemporaryDirectory(prefix="moefix-") as passing:
            yield Path(passing)
        return
    yield home


def wanted_tree(root: str | None, version: str | None, data: Path) -> Tree:
    """SGLang's tree: a named folder, a release from PyPI, or the installed one (`fixer.sglang.find_tree`)."""
    from fixer.sglang.find_tree import find_tree

    return find_tree(root, version, DataFolder(data).cache)


def wanted_flags(argv: Sequence[str], tree: Tree, data: Path) -> ServerFlags:
    """The SGLang flags among a command's words, read by the tree's own list of flags where that can be read.

    Raises:
        UsageError: a flag that this SGLang does not have; the nearest one is named.
    """
    from fixer.sglang.declared import declared_of
    from fixer.sglang.flags import parse_flags

    declared = declared_of(tree, data)
    flags = parse_flags(argv, declared)
    if not declared.flags:
        click.echo("moefix: SGLang's own list of flags cannot be read here: unknown flags were not checked", err=True)
    return flags


def report_after_tuning(home: Path, artefact: Artefact, tree: Tree) -> str:
    """Write a new artefact's report; one line that says where it is, or why there is none."""
    from fixer.report.make import report_after_tuning as report

    return report(home, artefact, tree)
