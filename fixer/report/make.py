"""The report of a tuning: a page that needs no network, and its short form for a terminal."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.shelf import artefact_path, kept_artefacts
from fixer.base.data_folder import DataFolder
from fixer.base.errors import StoreError, UsageError
from fixer.base.files import Damaged, read_bounded, write_atomically
from fixer.report.evidence import Sources, gather, named_tree
from fixer.report.page import render
from fixer.report.summary import Summary, summarise
from fixer.sglang.tree import Tree


@dataclass(frozen=True)
class Chosen:
    """The tuning that a report is about: its file, and what of the data folder was damaged."""

    artefact: Artefact
    path: Path
    damaged: tuple[Damaged, ...] = ()


def choose(named: Path | None, home: Path) -> Chosen:
    """The artefact in a file that the user names, else the newest one in the data folder.

    Raises:
        UsageError: the file is no artefact, or nothing was tuned yet.
    """
    if named is not None:
        try:
            return Chosen(Artefact.from_json(read_bounded(named)), named)
        except (OSError, ValueError) as fault:
            reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
            raise UsageError(
                f"{named} is no tuning: {reason}", "Name a file of artefacts/ in the data folder."
            ) from fault
    kept, damaged = kept_artefacts(home)
    if not kept:
        raise UsageError(
            f"nothing was tuned yet: there is no artefact in {home}",
            "Tune first (moefix tune --model NAME), or name an artefact's file.",
        )
    path, artefact = kept[0]
    return Chosen(artefact, path, damaged)


def summary_of(chosen: Chosen, home: Path, *, sglang_root: Path | None = None, compiles: bool = True) -> Summary:
    """What a report of that tuning says.

    Args:
        home: the data folder.
        sglang_root: a tree of SGLang to look into; None finds one that needs no network.
        compiles: have the kernels compiled whose shared memory is not on record.

    Raises:
        SGLangError: `sglang_root` is no SGLang, or another version than was tuned for.
    """
    tree = named_tree(sglang_root, chosen.artefact) if sglang_root is not None else None
    return summarise(gather(chosen.artefact, chosen.path.name, Sources(home, tree, compiles)))


def default_path(home: Path, artefact: Path) -> Path:
    """Where the report of an artefact's file is kept."""
    return DataFolder(home).reports / f"{artefact.stem}.html"


def write_report(summary: Summary, path: Path, home: Path) -> None:
    """Write the page.

    Raises:
        StoreError: it cannot be written.
    """
    write_atomically(path, render(summary, DataFolder(home).cache / "matplotlib").encode())


def report_after_tuning(home: Path, artefact: Artefact, tree: Tree) -> str:
    """Write the report of a tuning that was kept a moment ago, and say where it is, in one line.

    Compiles nothing. Never fails: a tuning, and the server after it, are worth more than a page about them.
    """
    kept = artefact_path(home, artefact.environment, artefact.workload)
    path = default_path(home, kept)
    try:
        write_report(summarise(gather(artefact, kept.name, Sources(home, tree, compiles=False))), path, home)
    except Exception as fault:  # whatever a drawing library throws
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # an older tuning's would be taken for this one's
        reason = fault.message if isinstance(fault, StoreError) else f"{type(fault).__name__}: {fault}"
        return f"the report could not be written: {' '.join(reason.split())[:300]}"
    return f"report: {path}"
