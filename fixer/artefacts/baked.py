"""What a ready-tuned image brings along, read-only and outside the data folder, which is a volume.

`MOEFIX_BAKED` names the folder. It has artefacts as a data folder has them (`artefacts/<card>/*.json`) and
`command.json`: the model and flags that the image was built for, as a list of words.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Environment
from fixer.artefacts.shelf import Found, Mismatch, find_artefact
from fixer.base.errors import StoreError
from fixer.base.files import read_bounded
from fixer.base.json_reading import parse_json
from fixer.sglang.flags import parse_flags
from fixer.sglang.words import server_words
from fixer.workload import Workload

VARIABLE = "MOEFIX_BAKED"
COMMAND_FILE = "command.json"


def baked_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the image keeps what it brought, None in any other environment."""
    named = environ.get(VARIABLE, "")
    return Path(named) if named else None


def is_baked(path: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a file is one that the image brought."""
    folder = baked_folder(environ)
    return folder is not None and folder in path.parents


def with_baked_command(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The command line, after the image's own where it names no model.

    `docker run IMAGE --port 8000` replaces the image's whole command; what the user means is the image's model on
    another port. SGLang takes the last of a flag that is given twice, so the user's words count.

    Raises:
        StoreError: the image's own command cannot be read.
    """
    folder = baked_folder(environ)
    if folder is None or not (folder / COMMAND_FILE).exists() or parse_flags(argv).model_path:
        return tuple(argv)
    return (*_command(folder / COMMAND_FILE), *server_words(argv))


def _command(path: Path) -> tuple[str, ...]:
    try:
        words = parse_json(read_bounded(path))
    except (OSError, ValueError) as fault:
        raise StoreError(f"{path} cannot be read: {fault}", "Name the model with --model.") from fault
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise StoreError(f"{path} is no list of words", "Name the model with --model.")
    return tuple(words)


def find_kept(
    home: Path,
    environment: Environment,
    workload: Workload,
    rows: Sequence[int],
    environ: Mapping[str, str] = os.environ,
    *,
    without: Container[Path] = (),
) -> Found:
    """The artefact that holds here, from the data folder or from the image.

    What was measured comes before what was not, what has all `rows` before what has not, the data folder before the
    image.

    Args:
        without: files to pass over.
    """
    folder = baked_folder(environ)
    own = find_artefact(home, environment, workload, without=without)
    if folder is None:
        return own
    brought = find_artefact(folder, environment, workload, without=without)
    known = [(found.artefact, found.path) for found in (own, brought) if found.artefact is not None]
    best, path = max(known, key=lambda each: _worth(each[0], rows), default=(None, None))
    mismatch = None if best else _nearest(own.mismatch, brought.mismatch)
    return Found(best, mismatch, (*own.damaged, *brought.damaged), path)


def _worth(artefact: Artefact, rows: Sequence[int]) -> tuple[bool, bool]:
    return artefact.measured, set(rows) <= {row.batch for row in artefact.rows}


def _nearest(*mismatches: Mismatch | None) -> Mismatch | None:
    there = [mismatch for mismatch in mismatches if mismatch is not None]
    return min(there, key=lambda mismatch: len(mismatch.parts), default=None)
