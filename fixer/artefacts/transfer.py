"""Takes artefacts from one machine to another as files, and writes them in the forms that SGLang and vLLM read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Environment
from fixer.artefacts.environment import card_of
from fixer.artefacts.install import Installation, TunedFiles, install_files
from fixer.artefacts.shelf import artefact_path, save_artefact
from fixer.base.errors import CardError, CompileError, SGLangError, UsageError
from fixer.base.files import read_bounded
from fixer.base.json_reading import parse_json
from fixer.families.family import Family
from fixer.families.registry import UNNAMED
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import Card, find_card
from fixer.model.config import Model
from fixer.model.rules.decide import decide
from fixer.model.rules.ladder import ladder
from fixer.sglang.flags import ServerFlags
from fixer.sglang.tree import Tree

# --- reading ---------------------------------------------------------------------------------------------------------


def read_artefacts(content: bytes) -> tuple[Artefact, ...]:
    """The artefacts in an exported file, or in what `moefix tune --json` prints: one, or a list of them.

    Raises:
        ValueError: anything at all is not as moefix writes it.
    """
    parsed = parse_json(content)
    if not isinstance(parsed, list):
        return (Artefact.from_json(content),)
    if len(parsed) > 64:
        raise ValueError("it has more than 64 artefacts")
    return tuple(Artefact.from_json(json.dumps(item)) for item in parsed)


def artefacts_in(path: Path) -> tuple[Artefact, ...]:
    """The artefacts in a file that a user names.

    Raises:
        UsageError: it cannot be read, is damaged, or is something else.
    """
    try:
        artefacts = read_artefacts(read_bounded(path))
    except OSError as fault:
        raise UsageError(f"{path} cannot be read: {fault.strerror or fault}") from fault
    except ValueError as fault:
        raise UsageError(
            f"{path} is no artefact, or a damaged one: {fault}", "Export it again: moefix export --as artefact."
        ) from fault
    if not artefacts:
        raise UsageError(f"{path} has no artefact in it")
    return artefacts


def keep(artefact: Artefact, home: Path) -> Path:
    """Have an artefact in the data folder; one that is there to the byte is not written again.

    Raises:
        StoreError: it cannot be written.
    """
    path = artefact_path(home, artefact.environment, artefact.workload)
    try:
        if read_bounded(path) == artefact.to_json().encode():
            return path
    except (OSError, ValueError):
        pass
    return save_artefact(home, artefact)


def install_in(tree: Tree, artefact: Artefact, home: Path) -> Installation:
    """Put an artefact's files where that tree looks for it.

    Raises:
        SGLangError: the artefact is of another SGLang or Triton, so that its files would not be found or not hold.
        StoreError: nothing can be written.
    """
    check_tree(artefact.environment, tree, artefact.family)
    check_names(artefact, tree)
    family = artefact.family
    overlay = family.reads_overlay(tree)
    return install_files(family.folder(tree), TunedFiles.of(artefact), home, tree.version, overlay=overlay)


def check_fit(artefact: Artefact, tree: Tree) -> str:
    """Refuse an artefact with tiles that its card cannot run: a checksum is against accidents, not against forgery.

    What is compiled for that is not kept: an image that is being baked is to have no cache in it.

    Returns:
        "", or why that could not be found out here.

    Raises:
        UsageError: it has such tiles.
    """
    from fixer.artefacts.check_files import misfit
    from fixer.kernel.cache import CompileCache
    from fixer.kernel.fit import compiler_for

    try:
        with tempfile.TemporaryDirectory(prefix="moefix-") as folder:
            scratch = Path(folder)
            with CompileCache(scratch) as cache:
                card = card_of(artefact.environment)
                why = misfit(artefact, card, compiler_for(tree, card, scratch, cache))
    except CompileError as fault:
        return fault.message
    if why:
        raise UsageError(f"the artefact of {artefact.model} does not fit its card: {why}", "Tune on that card.")
    return ""


def check_tree(environment: Environment, tree: Tree, family: Family = UNNAMED) -> None:
    """Refuse an artefact of another SGLang, Triton or kernel than a tree's.

    Raises:
        SGLangError: it is.
    """
    check_versions(environment, tree.version, tree.triton)
    if environment.kernel_hash != read_kernel_source(family.kernel_source(tree), family.kernel_names).sha256:
        raise SGLangError(
            f"the artefact is of another kernel than that of SGLang {tree.version} in {tree.package}",
            "One of the two SGLangs was changed: tune with this one.",
        )


def check_names(artefact: Artefact, tree: Tree) -> None:
    """Refuse an artefact whose files are not those that a tree asks for with its layer, on its card.

    Raises:
        SGLangError: they are others.
    """
    card = card_of(artefact.environment)
    wanted = artefact.family.lookup(tree, artefact.workload, card).names
    if artefact.files != wanted:
        raise SGLangError(
            f"the artefact is of {artefact.files[0]}, and SGLang in {tree.package} asks for {wanted[0]}",
            "Tune with this SGLang.",
        )


def check_versions(environment: Environment, sglang: str, triton: str) -> None:
    """Refuse an artefact of another SGLang or Triton.

    Raises:
        SGLangError: it is.
    """
    if (environment.sglang, environment.triton) != (sglang, triton):
        raise SGLangError(
            f"the artefact is of SGLang {environment.sglang} with Triton {environment.triton}, and here is SGLang "
            f"{sglang} with Triton {triton}",
            "Tune with this one, or take the SGLang that it was tuned with.",
        )


# --- choosing --------------------------------------------------------------------------------------------------------

Chosen = tuple[tuple[Path, Artefact], ...]


def for_card(kept: Chosen, name: str) -> Chosen:
    """Those of a card whose name has `name` in it, whatever the case, blanks and underscores."""
    wanted = _plain(name)
    return tuple((path, artefact) for path, artefact in kept if wanted in _plain(artefact.environment.card))


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace(" ", "")


def for_model(kept: Chosen, model: Model, flags: ServerFlags) -> Chosen:
    """Those that a server of that model with those flags would ask for, on their own card and SGLang."""
    return tuple((path, artefact) for path, artefact in kept if asks_for(artefact, model, flags))


def asks_for(artefact: Artefact, model: Model, flags: ServerFlags) -> bool:
    """Whether a server of that model with those flags, on the artefact's card and SGLang, has its workload.

    Raises:
        UsageError: flags that contradict one another.
        ModelError: the model's config makes no sense.
    """
    environment = artefact.environment
    card = Card(environment.card, environment.capability, environment.shared_memory, 0)
    return decide(model, flags, card, environment.sglang).workload == artefact.workload


def missing_rows(artefact: Artefact, flags: ServerFlags) -> tuple[int, ...]:
    """The batch sizes that a server with those flags runs on the artefact's card, and that it has no rows for.

    Empty where the card is none of the table's: its memory decides, and the artefact does not have it.
    """
    environment = artefact.environment
    try:
        card = find_card(environment.card)
    except (CardError, UsageError):
        return ()
    wanted = ladder(flags, card, environment.sglang, artefact.workload)
    return tuple(sorted(set(wanted) - {row.batch for row in artefact.rows}))


def only_one(chosen: Chosen) -> Artefact:
    """The one that is left.

    Raises:
        UsageError: none is, or several are.
    """
    if not chosen:
        raise UsageError("no kept tuning is like that", "moefix export --list shows what is kept.")
    if len(chosen) > 1:
        raise UsageError(
            f"{len(chosen)} kept tunings are like that: {'; '.join(describe(artefact) for _, artefact in chosen[:4])}",
            "Narrow it with --card or the model's flags, or name its file with --file (moefix export --list).",
        )
    return chosen[0][1]


def describe(artefact: Artefact) -> str:
    """One line: the model, the card, the layer, the versions, when."""
    environment = artefact.environment
    layer = artefact.family.describe(artefact.workload)
    basis = "measured" if artefact.measured else "not measured"
    return (
        f"{artefact.model} on {environment.card}, {layer}, SGLang {environment.sglang}, Triton {environment.triton}, "
        f"{len(artefact.rows)} rows, {basis} {artefact.created}"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


# What is there is kept under another name, unless moefix wrote it, which the data folder `home` knows.


def listing(kept: Sequence[tuple[Path, Artefact]], home: Path) -> str:
    """What is kept, two lines each."""
    return "\n".join(f"{describe(artefact)}\n    {path.relative_to(home)}" for path, artefact in kept)
