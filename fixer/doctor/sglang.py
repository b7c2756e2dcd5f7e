"""Checks of SGLang's tree and of its files for a model."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

from fixer.base.text import told
from fixer.doctor.examine import Finding, Patient, State
from fixer.machine.cards import Card
from fixer.sglang.declared import declared_of
from fixer.sglang.releases import PINNED, RELEASES, rules_for
from fixer.sglang.tree import Tree


def look_at_sglang(patient: Patient) -> Iterator[Finding]:
    """A tree is found, of a known version, with the kernel and the folder of tuning files."""
    from fixer.kernel.source import read_kernel_source

    tree = patient.tree
    if tree.version in RELEASES and not tree.guess:
        yield Finding("SGLang", State.OK, f"{tree.version} in {tree.package}")
    else:
        oldest, *_, newest = RELEASES
        yield Finding(
            "SGLang",
            State.WARNING,
            f"{tree.version} in {tree.package} is not among the {len(RELEASES)} releases that moefix knows "
            f"({oldest} to {newest}); models and number formats go by the rules of {rules_for(tree.release)}"
            + (f"; {tree.guess}" if tree.guess else ""),
            "If SGLang then looks for other files than moefix wrote, take a release that moefix knows (README).",
        )
    source = read_kernel_source(tree.kernel_source)
    yield Finding("SGLang's kernel", State.OK, f"{source.path.relative_to(tree.package)}, {source.sha256[:12]}")
    yield _place_of_files(tree)
    yield from _files_there(tree)


def _place_of_files(tree: Tree) -> Finding:
    folder = tree.triton_folder
    named = "" if tree.configs == tree.shipped_configs else " (SGLANG_MOE_CONFIG_DIR names it, in SGLang's own place)"
    if is_writable(folder):
        return Finding("tuning files", State.OK, f"{folder} can be written{named}")
    return Finding("tuning files", State.OK, f"{folder} is read-only{named}: an overlay in the data folder is used")


def _files_there(tree: Tree) -> Iterator[Finding]:
    folder = tree.triton_folder
    entries = _entries(folder)
    if folder.is_dir():
        count = sum(entry.suffix == ".json" for entry in entries)
        yield Finding("Triton's folder", State.OK, f"{folder.name} holds {count} tuning files")
    else:
        yield Finding(
            "Triton's folder",
            State.OK,
            f"{folder.name} is not there yet: SGLang takes other Triton versions' files, moefix makes the folder",
        )
    aside = [entry.name for entry in entries if ".damaged-" in entry.name]
    if aside:
        yield Finding(
            "Triton's folder",
            State.WARNING,
            f"{len(aside)} damaged or overflowing files were moved aside there: {aside[0]}",
            "Look at them and remove them when you need them no more.",
        )


def look_at_model(patient: Patient) -> Iterator[Finding]:
    """The named model can be read, and what SGLang does with it on each kind of card."""
    from fixer.machine.cards import kinds
    from fixer.model.config import load_model
    from fixer.model.rules.decide import decide

    if not patient.flags.model_path:
        return
    model = load_model("", patient.flags)
    yield Finding("model", State.OK, f"{model.name}: {model.architecture}" + (f" ({model.note})" if model.note else ""))
    for group in kinds(patient.cards):
        decision = decide(model, patient.flags, group[0], patient.tree.release, declared_of(patient.tree))
        yield Finding("model", State.OK, f"on {group[0].name}: {decision.reason}")
        if decision.workload is not None:
            yield from _files_for(patient.tree, decision.workload, group[0])


def _files_for(tree: Tree, workload: object, card: Card) -> Iterator[Finding]:
    from fixer.base.files import read_bounded
    from fixer.sglang.tuning_files import parse_table
    from fixer.workload import Workload

    assert isinstance(workload, Workload)
    lookup = tree.lookup(workload, card)
    for path in filter(None, lookup.paths):
        try:
            parse_table(read_bounded(path))
        except (OSError, ValueError) as fault:
            yield Finding(
                "tuning files",
                State.FAILURE,
                f"SGLang would read {path} and fail: {told(fault)}",
                "Start with moefix, which moves it aside, or move it away.",
            )
        else:
            yield Finding("tuning files", State.OK, f"SGLang reads {path.parent.name}/{path.name}")


def is_writable(folder: Path) -> bool:
    """Whether this user can make files in a folder, or make the folder where it is not there yet."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def look_at_pin(patient: Patient) -> Iterator[Finding]:
    """SGLang and Triton are the pinned ones."""
    tree = patient.tree
    good = tree.version == PINNED
    yield Finding(
        "SGLang",
        State.OK if good else State.WARNING,
        f"{tree.version} in {tree.package}",
        "" if good else f"This moefix is built and tested with {PINNED}: set SGLANG_VERSION.",
    )
    wanted = RELEASES.get(tree.version, RELEASES[PINNED]).triton
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    good = version == wanted
    fix = "" if good else f"SGLang {tree.version} runs with Triton {wanted}: set TRITON_VERSION."
    yield Finding("Triton", State.OK if good else State.FAILURE, version, fix)
