"""Which files of a repository SGLang loads, and whether a folder has them: rules on names, without a network.

Sources, in SGLang 0.5.17: model_loader/loader.py:452-550 (patterns by load format), weight_utils.py:374-624 beside it
(what a local snapshot must hold, what is fetched otherwise), server_args.py:7334-7390 (Mistral's own format),
configs/load_config.py:119-127 (what is passed over).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from fixer.base.files import read_bounded
from fixer.base.json_reading import parse_json

_SAFETENSORS, _BIN, _PT, _CONSOLIDATED = "*.safetensors", "*.bin", "*.pt", "consolidated*.safetensors"

# By load format, in the order in which SGLang looks; the first that a repository has is loaded.
_PATTERNS = {
    "auto": (_SAFETENSORS, _BIN, _PT),
    "layered": (_SAFETENSORS, _BIN, _PT),
    "flash_rl": (_SAFETENSORS, _BIN, _PT),
    "presharded": (_SAFETENSORS, _BIN, _PT),
    "safetensors": (_SAFETENSORS, _PT),
    "fastsafetensors": (_SAFETENSORS, _PT),
    "mistral": (_CONSOLIDATED, _PT),
    "pt": (_PT,),
    "npcache": (_BIN, _PT),
}

FETCHED = frozenset(_PATTERNS)
"""The load formats whose files moefix fetches. With "dummy" there are none; all others are left to SGLang."""

# Families that SGLang loads in Mistral's format whatever else is there (server_args.py:7349).
_MISTRAL_NAMES = ("mistral-large-3", "mistral-small-4", "leanstral")

_NOT_LOADED = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_SKIPPED_FOLDERS = frozenset({"original", "onnx", "openvino", "gguf", "metal", "coreml"})
_SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".vocab", ".spm", ".yaml")
_CODE = ".py"
_INDEX = ".index.json"
_SHARD = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(\.[a-z]+)")
_SOLE = frozenset({"model.safetensors", "consolidated.safetensors", "pytorch_model.bin"})
_MOST_INDEX_BYTES = 128 << 20


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository.

    Attributes:
        path: its name there, with folders.
        size: in bytes.
        blob: its name in the cache's `blobs`: the sha256 of a large file, git's own hash of a small one.
    """

    path: str
    size: int
    blob: str


@dataclass(frozen=True)
class Choice:
    """What is fetched: the weights, and the small files beside them (config, tokenizer, templates, index)."""

    weights: tuple[RepoFile, ...]
    small: tuple[RepoFile, ...]


def choose(
    files: Sequence[RepoFile], name: str, load_format: str, *, moves: bool = False, code: bool = False
) -> Choice:
    """What SGLang would load of a repository.

    Args:
        files: all of the repository's files.
        name: the repository's, "owner/name".
        load_format: SGLang's, one of `FETCHED`.
        moves: the revision is a branch or tag by name. SGLang then asks for every file that its pattern matches, and
            would fetch those that are missing once more; so none of them is left out.
        code: the model's own Python files are wanted too.

    Returns:
        The choice; without weights where the repository has none that SGLang would load.
    """
    safe = [file for file in files if is_safe(file.path)]
    root = [file for file in safe if "/" not in file.path]
    pattern = _pattern({file.path for file in root}, name, load_format)
    weights: list[RepoFile] = []
    if pattern is not None and moves:
        weights = [file for file in safe if fnmatchcase(file.path, pattern) and not file.path.startswith("original/")]
    elif pattern is not None:
        weights = _without_duplicates([file for file in root if fnmatchcase(file.path, pattern)], pattern)
    suffixes = (*_SMALL, _CODE) if code else _SMALL
    small = [file for file in safe if _is_small(file.path, suffixes)]
    if not moves:  # an index whose files are not there makes SGLang fetch them (weight_utils.py:374)
        small = [file for file in small if _is_index_of(file.path, pattern) or not file.path.endswith(_INDEX)]
    return Choice(tuple(weights), tuple(small))


def files_of(folder: Path) -> list[RepoFile]:
    """The files of a model's folder, as a repository would have them: no hidden ones. Links to files count."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths = [Path(here, name) for name in sorted(names) if not name.startswith(".")]
        found += [RepoFile(str(p.relative_to(folder)), p.stat().st_size, "") for p in paths if p.is_file()]
    return found


def is_safe(path: str) -> bool:
    """Whether a name from the hub stays inside the folder that it is put in."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not any(part in {"", ".", ".."} for part in parts)


def _is_small(path: str, suffixes: tuple[str, ...]) -> bool:
    folders = PurePosixPath(path).parts[:-1]
    return path.endswith(suffixes) and not _SKIPPED_FOLDERS.intersection(folders)


def _pattern(root: set[str], name: str, load_format: str) -> str | None:
    """The pattern of the files that SGLang loads, out of the names in a repository's root; None for none."""
    patterns = _PATTERNS[load_format]
    if load_format == "auto" and _is_mistral_native(root, name):
        patterns = _PATTERNS["mistral"]
    return next((pattern for pattern in patterns if any(fnmatchcase(path, pattern) for path in root)), None)


def _is_mistral_native(root: set[str], name: str) -> bool:
    if "params.json" in root and any(part in name.lower() for part in _MISTRAL_NAMES):
        return True
    consolidated = any(fnmatchcase(path, _CONSOLIDATED) for path in root)
    return consolidated and not any(fnmatchcase(path, "model-*.safetensors") for path in root)


def _without_duplicates(files: list[RepoFile], pattern: str) -> list[RepoFile]:
    """Without a second copy of the weights in Mistral's format, and without what a training left."""
    files = [file for file in files if not file.path.endswith(_NOT_LOADED)]
    if pattern == _SAFETENSORS:
        files = [file for file in files if not fnmatchcase(file.path, _CONSOLIDATED)] or files
    return files


def _is_index_of(path: str, pattern: str | None) -> bool:
    """Whether a name is that of the index of the files that a pattern takes."""
    if not path.endswith(_INDEX) or pattern is None:
        return False
    files = path.removesuffix(_INDEX)
    return fnmatchcase(files, pattern) and (pattern != _SAFETENSORS or not fnmatchcase(files, _CONSOLIDATED))


# --- what is there ---------------------------------------------------------------------------------------------------


class Presence(Enum):
    """Whether a folder holds a model's weights."""

    COMPLETE = "complete"
    UNSURE = "unsure"
    """Some are there, and their names do not say how many there should be."""
    INCOMPLETE = "incomplete"


def presence(folder: Path, name: str, load_format: str) -> Presence:
    """Whether a snapshot of a repository has all the weights that SGLang would load, by its index and its names."""
    try:
        root = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError:
        return Presence.INCOMPLETE
    pattern = _pattern(root, name, load_format)
    there = {path for path in root if pattern is not None and fnmatchcase(path, pattern)}
    there -= {path for path in there if path.endswith(_NOT_LOADED)}
    if not there:
        return Presence.INCOMPLETE
    indexed = _indexed(folder / path for path in root if _is_index_of(path, pattern))
    if not indexed <= root or _shards_missing(there):
        return Presence.INCOMPLETE
    sure = bool(indexed) or there <= _SOLE or all(_SHARD.fullmatch(path) for path in there)
    return Presence.COMPLETE if sure else Presence.UNSURE


def _indexed(indices: Iterable[Path]) -> set[str]:
    """The files that index files name; an index that cannot be read names none (SGLang passes over it as well)."""
    named: set[str] = set()
    for path in indices:
        try:
            index = parse_json(read_bounded(path, _MOST_INDEX_BYTES))
        except (OSError, ValueError):
            continue
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if isinstance(weight_map, dict):
            named |= {name for name in weight_map.values() if isinstance(name, str)}
    return named


def _shards_missing(names: Iterable[str]) -> bool:
    """Whether of files "x-00001-of-00003.y" one is missing."""
    shards = [match.groups() for match in map(_SHARD.fullmatch, names) if match is not None]
    sets = {(stem, total, suffix) for stem, _, total, suffix in shards}
    return any(
        sum((stem, total, suffix) == (other, count, ending) for other, _, count, ending in shards) < int(total)
        for stem, total, suffix in sets
    )
