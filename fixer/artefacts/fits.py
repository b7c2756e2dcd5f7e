"""Whether the card can run a kept artefact's tiles. One that overflows its shared memory would end SGLang's start.

An artefact's checksum is against accidents, not against forgery, so its tiles are compiled before they are installed.
An artefact says itself for which card, limit, kernel and Triton it holds; so what was found fit is known by its content
from then on: an empty file `fits/<SHA-256>` in the data folder, or in what a ready-tuned image brought.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.baked import baked_folder
from fixer.base.errors import StoreError
from fixer.base.files import write_atomically
from fixer.machine.cards import Card
from fixer.sglang.tree import Tree


def is_known_to_fit(home: Path, artefact: Artefact, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this very artefact was measured here, or found fit at an earlier start."""
    folders = (home, baked_folder(environ))
    return any(_mark(folder, artefact).is_file() for folder in folders if folder is not None)


def remember_fit(home: Path, artefact: Artefact) -> None:
    """Have later starts know that this very artefact's tiles fit."""
    with suppress(StoreError):  # then the next start looks again
        write_atomically(_mark(home, artefact), b"")


def _mark(folder: Path, artefact: Artefact) -> Path:
    return folder / "fits" / hashlib.sha256(artefact.to_json().encode()).hexdigest()


def misfit_of(artefact: Artefact, tree: Tree, card: Card, home: Path, scratch: Path) -> str:
    """Why the card cannot run an artefact's tiles, "" where it can, which is then remembered. Compiles what is new.

    Args:
        artefact: one that holds for that tree.
        home: the data folder.
        scratch: a folder with some space, for what is compiled.

    Raises:
        CompileError: nothing can be compiled here.
        SGLangError: the tree has no kernel that moefix knows.
    """
    from fixer.artefacts.check_files import misfit
    from fixer.kernel.cache import CompileCache
    from fixer.kernel.fit import compiler_for

    with CompileCache(home) as cache:
        why = misfit(artefact, card, compiler_for(tree, card, scratch, cache))
    if not why:
        remember_fit(home, artefact)
    return why
