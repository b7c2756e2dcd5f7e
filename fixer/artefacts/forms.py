"""The forms in which an artefact leaves moefix: artefact, SGLang's pair, vLLM's file, a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.install import TunedFiles, write_beside
from fixer.artefacts.vllm import approximations, vllm_file_name, vllm_table
from fixer.base.errors import SGLangError, UsageError
from fixer.sglang.find_tree import fetched_tree, installed_tree, tree_at
from fixer.sglang.releases import RELEASES
from fixer.sglang.tree import Tree
from fixer.sglang.tuning_files import render_table
from fixer.workload import Workload


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


@dataclass(frozen=True)
class Written:
    """What was written: the files that matter, and what a person should know, one sentence each."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def write_artefact(artefact: Artefact, path: Path, home: Path | None = None) -> Written:
    """The artefact as one file.

    Raises:
        StoreError: it cannot be written.
    """
    return Written((path,), write_beside(((path, artefact.to_json().encode()),), home))


def write_sglang(artefact: Artefact, folder: Path, home: Path | None = None) -> Written:
    """SGLang's pair of files under their exact names.

    Raises:
        StoreError: they cannot be written; neither is changed.
    """
    files = _pair_files(artefact, folder)
    note = f"SGLang {artefact.environment.sglang} looks in {artefact.family.folder_name(artefact.environment.triton)}"
    return Written(tuple(path for path, _ in files), (*write_beside(files, home), note))


def write_vllm(artefact: Artefact, folder: Path, home: Path | None = None) -> Written:
    """vLLM's joint file.

    Raises:
        StoreError: it cannot be written.
        UsageError: vLLM has no such file.
    """
    workload = artefact.workload
    if not isinstance(workload, Workload):
        raise UsageError(f"vLLM reads no file of the {artefact.family.layer} as moefix tunes it", "Use another form.")
    path = folder / vllm_file_name(workload, artefact.environment.card)
    kept = write_beside(((path, render_table(vllm_table(artefact))),), home)
    return Written((path,), (*kept, *approximations(artefact), f"start vLLM with VLLM_TUNED_CONFIG_FOLDER={folder}"))


def write_config_dir(artefact: Artefact, folder: Path, tree: Tree | None, home: Path | None = None) -> Written:
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
    pair = _pair_files(artefact, folder / artefact.family.folder_name(artefact.environment.triton))
    kept = write_beside(tuple((files | dict(pair)).items()), home)
    note = f"{shipped} files of SGLang {artefact.environment.sglang} are in it, since it takes their place"
    if not shipped:
        note = "SGLang's shipped files are NOT in it: with this folder every other model runs without a tuning file"
    notes = (*kept, note, f"start SGLang with SGLANG_MOE_CONFIG_DIR={folder}")
    return Written(tuple(path for path, _ in pair), notes)


def _pair_files(artefact: Artefact, folder: Path) -> tuple[tuple[Path, bytes], ...]:
    return TunedFiles.of(artefact).files(folder)


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
