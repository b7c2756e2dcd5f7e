"""What a report rests on besides the artefact: gathered from the data folder and SGLang's tree, each part optional.

A part that is not there is left out of the report, with a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.base.data_folder import DataFolder
from fixer.base.errors import MoefixError
from fixer.bench.results import BenchResult, Kind
from fixer.bench.shelf import results_for
from fixer.kernel.cache import CompileCache, compile_with_cache, triton_version
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import Card
from fixer.sglang.find_tree import fetched_tree, installed_tree, tree_at
from fixer.sglang.own_choices import OwnChoice
from fixer.sglang.releases import RELEASES
from fixer.sglang.tree import Tree
from fixer.tuning.journal import RunKey, read_looks
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Outcome
from fixer.workload import Kernel, RowTiles


class Part(Enum):
    """What may be missing."""

    OWN = "SGLang's own configurations"
    SHARED = "shared memory"
    SEARCH = "the search"


@dataclass(frozen=True)
class Evidence:
    """All that a report is made of.

    Attributes:
        artefact: the tuning.
        name: the artefact's file name.
        own: SGLang's own choice by M, as if moefix had never run; empty where its tree is not at hand.
        shared: shared memory in bytes that a block of a kernel needs; a kernel of which it is not known is absent.
        looks: every kernel that was tried, in order; empty where the journal does not have them.
        bench: the newest comparison of each kind.
        missing: why a part is not there, one sentence each.
        notes: what a reader must know about what is there.
    """

    artefact: Artefact
    name: str
    own: Mapping[int, OwnChoice] = field(default_factory=dict)
    shared: Mapping[Kernel, int] = field(default_factory=dict)
    looks: tuple[Look, ...] = ()
    bench: Mapping[Kind, BenchResult] = field(default_factory=dict)
    missing: Mapping[Part, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def own_pair(self, batch: int) -> RowTiles | None:
        """SGLang's own tiles for a row, None where it is not known."""
        choice = self.own.get(batch)
        return choice.tiles if choice else None

    def bytes_of(self, row: RowTiles | None) -> tuple[int | None, ...]:
        """What each product's kernel needs, None where it is not known."""
        if row is None:
            return (None,) * len(self.artefact.family.products)
        return tuple(self.shared.get(kernel) for kernel in row.kernels)


@dataclass(frozen=True)
class Sources:
    """Where to look.

    Attributes:
        home: the data folder.
        tree: SGLang's tree; None looks for one of the artefact's version that needs no network.
        compiles: have the kernels compiled whose shared memory is not on record; it takes about a second each.
    """

    home: Path
    tree: Tree | None = None
    compiles: bool = True


def gather(artefact: Artefact, name: str, sources: Sources) -> Evidence:
    """Look for everything that a report of this artefact can show. Never fails for a part that is not there."""
    missing: dict[Part, str] = {}
    notes: list[str] = []
    looks = read_looks(DataFolder(sources.home).journal, RunKey(artefact.environment, artefact.workload))
    if not looks:
        missing[Part.SEARCH] = "The data folder's journal has no trials of this tuning, so its search is not shown."
    tree = sources.tree or tree_of(artefact, sources.home)
    own: Mapping[int, OwnChoice] = {}
    if tree is None:
        missing[Part.OWN] = (
            f"SGLang {artefact.environment.sglang} is not at hand, so its own configurations are not shown "
            "(moefix report --sglang-root DIR)."
        )
    else:
        try:
            own = own_of(artefact, tree)
        except MoefixError as fault:
            missing[Part.OWN] = f"SGLang's own configurations are not shown: {fault.message}"
    found = {kind: result for result in reversed(results_for(sources.home, name)) for kind in (result.kind,)}
    evidence = Evidence(artefact, name, own, {}, looks, found, missing)
    known = {look.build.kernel: look.build.shared_bytes for look in looks if look.build.outcome is Outcome.OK}
    shared, why = _shared_memory(evidence, known, tree, sources)
    if why:
        missing[Part.SHARED] = why
    elif shared.keys() - known.keys() and triton_version() != artefact.environment.triton:
        notes.append(
            f"Shared memory was compiled with Triton {triton_version()}; the tuning ran with "
            f"{artefact.environment.triton}, whose kernels may need another amount."
        )
    return replace(evidence, shared=shared, missing=missing, notes=tuple(notes))


# --- SGLang's own ----------------------------------------------------------------------------------------------------


def tree_of(artefact: Artefact, home: Path) -> Tree | None:
    """A tree of the SGLang that the artefact is for: the installed one, else one that was fetched before."""
    wanted = artefact.environment.sglang
    try:
        installed = installed_tree()
        if installed is not None and installed.version == wanted:
            return installed
    except MoefixError:
        pass
    release = RELEASES.get(wanted)
    if release is not None and release.is_kept(DataFolder(home).cache):
        return fetched_tree(wanted, DataFolder(home).cache)
    return None


def named_tree(root: Path, artefact: Artefact) -> Tree:
    """The tree that a user names.

    Raises:
        SGLangError: there is none, or it is of another version than the artefact's.
    """
    from fixer.base.errors import SGLangError

    tree = tree_at(root)
    if tree.version != artefact.environment.sglang:
        raise SGLangError(
            f"{root} is SGLang {tree.version}, and the tuning is for {artefact.environment.sglang}",
            "Name a tree of that version, or leave out --sglang-root.",
        )
    return tree


def card_of(artefact: Artefact) -> Card:
    """The card that was tuned; its memory is not on record."""
    environment = artefact.environment
    return Card(environment.card, environment.capability, environment.shared_memory, 0, driver=environment.driver)


def own_of(artefact: Artefact, tree: Tree) -> dict[int, OwnChoice]:
    """What SGLang would run for each row if moefix had never installed anything.

    Raises:
        SGLangError: the tree is not one that moefix knows, or a file in it cannot be read.
    """
    tree = replace(tree, triton=artefact.environment.triton)
    card = card_of(artefact)
    family = artefact.family
    lookup = family.lookup(tree, artefact.workload, card, without_moefix=True)
    choose = family.own_choices(tree, lookup, artefact.workload, card)
    return {row.batch: choose(row.batch) for row in artefact.rows}


# --- shared memory ---------------------------------------------------------------------------------------------------


def _shared_memory(
    evidence: Evidence, known: Mapping[Kernel, int], tree: Tree | None, sources: Sources
) -> tuple[Mapping[Kernel, int], str]:
    """Bytes by kernel, of the rows' kernels and SGLang's own; and why there are none, "" where there are."""
    artefact = evidence.artefact
    pairs = [row.tiles for row in artefact.rows]
    pairs += [pair for row in artefact.rows if (pair := evidence.own_pair(row.batch))]
    wanted = dict.fromkeys(kernel for pair in pairs for kernel in pair.kernels)
    shared = {kernel: known[kernel] for kernel in wanted if kernel in known}
    unknown = [kernel for kernel in wanted if kernel not in known]
    if not unknown:
        return shared, ""
    if tree is None:
        return shared, "" if shared else f"SGLang {artefact.environment.sglang} is not at hand to be compiled."
    try:
        source = read_kernel_source(artefact.family.kernel_source(tree), artefact.family.kernel_names)
        if source.sha256 != artefact.environment.kernel_hash:
            return shared, "" if shared else "SGLang's kernel has another source now than when it was tuned."
        card = card_of(artefact)
        target = Target(source, card.arch, DataFolder(sources.home).kernels, card.name)
        compiled = _compile(target, [Candidate(artefact.workload, k.projection, k.tile) for k in unknown], sources)
    except MoefixError as fault:
        return shared, "" if shared else fault.message
    for candidate, result in compiled.items():
        if result.outcome is CompileOutcome.OK:
            shared[Kernel(candidate.projection, candidate.tile)] = result.shared_bytes
    return shared, "" if shared else "No kernel's shared memory is on record: `moefix report` compiles them."


def _compile(target: Target, candidates: Iterable[Candidate], sources: Sources) -> Mapping[Candidate, Compiled]:
    with CompileCache(sources.home) as cache:
        if not sources.compiles:
            return cache.find(target, candidates)
        return compile_with_cache(target, candidates, cache, DataFolder(sources.home).triton)
