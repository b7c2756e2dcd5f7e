"""Which of a model's files the hub's cache has already."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fixer.model.download.weights import Presence, RepoFile, presence
from fixer.model.hub import commit_in_cache, hub_cache, repository_folder, snapshot_folder


def cached(name: str, revision: str | None, load_format: str, download_dir: str | None) -> tuple[str | None, Presence]:
    """The commit that the caches have for a revision, and whether its weights are there.

    SGLang looks into `--download-dir` first and then into the client's cache (weight_utils.py:422-470).
    """
    own = [Path(download_dir).expanduser()] if download_dir else []
    best: tuple[str | None, Presence] = (None, Presence.INCOMPLETE)
    for cache in (*own, hub_cache()):
        commit = commit_in_cache(cache, name, revision)
        if commit is not None:
            found = presence(snapshot_folder(cache, name, commit), name, load_format)
            if found is not Presence.INCOMPLETE:
                return commit, found
            best = commit, found
    return best


@dataclass(frozen=True)
class Place:
    """A cache folder, and what of the repository goes there."""

    cache: Path
    files: tuple[RepoFile, ...]


def bytes_there(name: str, commit: str, place: Place, since: float = math.inf) -> int:
    """Bytes of a place's files that have come; of unfinished files those that were written to at or after `since`."""
    folder = snapshot_folder(place.cache, name, commit)
    blobs = _sizes(repository_folder(place.cache, name) / "blobs", since)
    parts: dict[str, int] = {}
    for entry, size in blobs.items():
        if entry.endswith(".incomplete"):
            blob = entry.partition(".")[0]
            parts[blob] = max(size, parts.get(blob, 0))
    return sum(
        file.size if file.blob in blobs or (folder / file.path).exists() else min(file.size, parts.get(file.blob, 0))
        for file in place.files
    )


def _sizes(folder: Path, since: float) -> dict[str, int]:
    """Names and sizes on the disk. hf_xet writes in any order, and what it has not written takes no space."""
    sizes = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                about = entry.stat()
                if about.st_mtime >= since or not entry.name.endswith(".incomplete"):
                    sizes[entry.name] = min(about.st_size, about.st_blocks * 512)
    return sizes


def total_bytes(places: Sequence[Place]) -> int:
    """Bytes of all files, those that are there too."""
    return sum(file.size for place in places for file in place.files)
