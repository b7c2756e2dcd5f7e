"""Takes artefacts from one machine to another as files, and writes them in the forms that SGLang and vLLM read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from fixer.model.rules.decide import decide
from fixer.base.errors import CardError, CompileError, SGLangError, UsageError
from fixer.sglang.flags import ServerFlags
from fixer.machine.cards import Card, find_card
from fixer.artefacts.install import Installation, Pair, install_pair, render_table
from fixer.artefacts.fits import card_of, misfit_of, remember_fit
from fixer.kernel.compile import read_kernel_source
from fixer.model.rules.ladder import ladder
from fixer.model.config import Model
from fixer.plan.make_plan import Plan
from fixer.sglang.tree import RELEASES, Tree, fetched_tree, installed_tree, tree_at
from fixer.artefacts.shelf import Artefact, Decision, Environment, RowChoice, artefact_path, parse_json, read_bounded, save_artefact, utc_now, write_together
from fixer.artefacts.vllm import approximations, vllm_file_name, vllm_table


class Form(Enum):
    """What an artefact is written as."""

    ARTEFACT = "artefact"
    """One file that `moefix import` and `moefix bake --artefact` read."""
    SGLANG = "sglang"
    """SGLang's pair of files."""
    VLLM = "vllm"
    """vLLM's one file."""
    CONFIG_DIR = "config-dir"
    """A folder for SGLANG_MOE_CONFIG_DIR, with SGLang's shipped files in it."""


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
    """Put an artefact's pair of files where that tree looks for it.

    Raises:
        SGLangError: the artefact is of another SGLang or Triton, so that its files would not be found or not hold.
        StoreError: nothing can be written.
    """
    check_tree(artefact.environment, tree)
    return install_pair(tree.triton_folder, Pair.of(artefact), home, tree.version)


def check_fit(artefact: Artefact, tree: Tree, home: Path) -> str:
    """Refuse an artefact with tiles that its card cannot run; that they fit is remembered in the data folder.

    What is compiled for that is not kept: an image that is being baked is to have no cache in it.

    Returns:
        "", or why that could not be found out here.

    Raises:
        UsageError: it has such tiles.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="moefix-") as folder:
            scratch = Path(folder)
            why = misfit_of(artefact, tree, card_of(artefact.environment), scratch, scratch)
    except CompileError as fault:
        return fault.message
    if why:
        raise UsageError(f"the artefact of {artefact.model} does not fit its card: {why}", "Tune on that card.")
    remember_fit(home, artefact)
    return ""


def check_tree(environment: Environment, tree: Tree) -> None:
    """Refuse an artefact of another SGLang, Triton or kernel than a tree's.

    Raises:
        SGLangError: it is.
    """
    check_versions(environment, tree.version, tree.triton)
    if environment.kernel_hash != read_kernel_source(tree.kernel_source).sha256:
        raise SGLangError(
            f"the artefact is of another kernel than that of SGLang {tree.version} in {tree.package}",
            "One of the two SGLangs was changed: tune with this one.",
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
    environment, workload = artefact.environment, artefact.workload
    layer = f"E={workload.experts},N={workload.intermediate} {workload.number_format.value} tp {workload.tp_size}"
    basis = "measured" if artefact.measured else "not measured"
    return (
        f"{artefact.model} on {environment.card}, {layer}, SGLang {environment.sglang}, Triton {environment.triton}, "
        f"{len(artefact.rows)} rows, {basis} {artefact.created}"
    )


# --- from a plan -----------------------------------------------------------------------------------------------------


def planned_artefact(plan: Plan, environment: Environment) -> Artefact:
    """What a plan proposes, as an artefact that says that nothing was measured.

    Args:
        plan: a compiled one.
        environment: the tree's and the card's; its driver is left out, since nothing ran.

    Raises:
        UsageError: SGLang reads no file there, or the plan has a row without a proposal.
    """
    workload = plan.decision.workload
    rows = [(row.tokens, row.proposed) for row in plan.rows]
    if plan.lookup is None or workload is None or not rows or any(proposed is None for _, proposed in rows):
        raise UsageError(f"there is nothing to write for {plan.model.name} on {plan.card.name}", plan.decision.reason)
    if not plan.lookup.down:
        raise UsageError(f"SGLang {plan.sglang_version} reads one joint file for both projections")
    return Artefact(
        environment=replace(environment, driver=""),
        model=plan.model.name,
        revision=plan.model.revision or "",
        workload=workload,
        gate_up_file=plan.lookup.gate_up,
        down_file=plan.lookup.down,
        rows=tuple(
            RowChoice(tokens, proposed.gate_up, proposed.down, Decision.FITTING_ONLY)
            for tokens, proposed in rows
            if proposed is not None
        ),
        created=utc_now(),
        seconds=0.0,
        measured=False,
    )


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What was written: the files that matter, and what a person should know, one sentence each."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def write_artefact(artefact: Artefact, path: Path) -> Written:
    """The artefact as one file.

    Raises:
        StoreError: it cannot be written.
    """
    write_together(((path, artefact.to_json().encode()),))
    return Written((path,), ())


def write_sglang(artefact: Artefact, folder: Path) -> Written:
    """SGLang's pair of files under their exact names.

    Raises:
        StoreError: they cannot be written; neither is changed.
    """
    files = _pair_files(artefact, folder)
    write_together(files)
    where = f"configs/triton_{artefact.environment.triton.replace('.', '_')}"
    return Written(tuple(path for path, _ in files), (f"SGLang {artefact.environment.sglang} looks in {where}",))


def write_vllm(artefact: Artefact, folder: Path) -> Written:
    """vLLM's joint file.

    Raises:
        StoreError: it cannot be written.
    """
    path = folder / vllm_file_name(artefact.workload, artefact.environment.card)
    write_together(((path, render_table(vllm_table(artefact))),))
    return Written((path,), (*approximations(artefact), f"start vLLM with VLLM_TUNED_CONFIG_FOLDER={folder}"))


def write_config_dir(artefact: Artefact, folder: Path, tree: Tree | None) -> Written:
    """A folder for SGLANG_MOE_CONFIG_DIR: all files that SGLang ships, copied, and the pair.

    Args:
        folder: new, or one of before.
        tree: the SGLang whose shipped files go in; None leaves them out, and says so.

    Raises:
        StoreError: it cannot be written.
    """
    configs = folder / "configs"
    files: dict[Path, bytes] = {}
    if tree is not None:
        for path in sorted(tree.shipped_configs.glob("triton_*/*.json")):
            files[configs / path.parent.name / path.name] = path.read_bytes()
    shipped = len(files)
    pair = _pair_files(artefact, configs / f"triton_{artefact.environment.triton.replace('.', '_')}")
    write_together(tuple((files | dict(pair)).items()))
    note = f"{shipped} files of SGLang {artefact.environment.sglang} are in it, since it takes their place"
    if not shipped:
        note = "SGLang's shipped files are NOT in it: with this folder every other model runs without a tuning file"
    return Written(tuple(path for path, _ in pair), (note, f"start SGLang with SGLANG_MOE_CONFIG_DIR={folder}"))


def _pair_files(artefact: Artefact, folder: Path) -> tuple[tuple[Path, bytes], ...]:
    pair = Pair.of(artefact)
    return (
        (folder / pair.gate_up_name, render_table(pair.gate_up)),
        (folder / pair.down_name, render_table(pair.down)),
    )


def tree_of(version: str, root: Path | None, cache: Path, say: Callable[[str], None]) -> Tree | None:
    """The tree of an SGLang release: a named one, the installed one, or one fetched from PyPI; None, said, for none.

    Raises:
        SGLangError: the named tree is none, or of another release.
    """
    if root is not None:
        named = tree_at(root)
        if named.version != version:
            raise SGLangError(f"SGLang in {root} is {named.version}, and the artefact is of {version}")
        return named
    here = installed_tree()
    if here is not None and here.version == version:
        return here
    if version not in RELEASES:
        say(f"SGLang {version} is not installed here, and moefix cannot fetch it")
        return None
    try:
        return fetched_tree(version, cache)
    except SGLangError as fault:
        say(fault.message)
        return None


def listing(kept: Sequence[tuple[Path, Artefact]], home: Path) -> str:
    """What is kept, two lines each."""
    return "\n".join(f"{describe(artefact)}\n    {path.relative_to(home)}" for path, artefact in kept)
