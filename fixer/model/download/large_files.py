"""Large files, taken up where an earlier attempt ended."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fixer.base.errors import HubError
from fixer.model.download.cached import Place
from fixer.model.download.weights import RepoFile
from fixer.model.hub import UnreachableError, repository_folder

QUIET_SECONDS = 3.0
"""A part of a file that does not grow for so long, and whose lock is free, belongs to nobody any more."""


KEPT_HINT = "start again: what has come is kept"


def is_resumable(file: RepoFile) -> bool:
    """Whether a file comes in one stream from its first byte to its last."""
    from huggingface_hub import constants

    has_xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    return file.is_large and not (file.is_xet and has_xet)


def get_large(name: str, commit: str, cache: Path, file: RepoFile) -> None:
    """One large file into the cache's blobs, going on where an earlier attempt was.

    Raises:
        UnreachableError: what came is not the file.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    blob = repository_folder(cache, name) / "blobs" / file.blob
    lock = _lock_path(cache, name, file)
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return  # another process fetched it meanwhile
        part = blob.with_name(file.blob + ".incomplete")
        with part.open("ab") as out:
            have = out.tell()
            if have > file.size:
                out.truncate(0)
                have = 0
            http_get(
                hf_hub_url(name, file.path, revision=commit),
                out,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.path,
            )
        if have and _sha256(part) != file.blob:
            part.unlink()
            raise UnreachableError(HubError(f"what came of {file.path} is not what the hub has", KEPT_HINT))
        part.replace(blob)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lock_path(cache: Path, name: str, file: RepoFile) -> Path:
    return cache / ".locks" / repository_folder(cache, name).name / f"{file.blob}.lock"


_CLIENTS_PART = re.compile(r"([0-9a-f]{40,64})\.[0-9a-f]{8}\.incomplete")


def tidy(name: str, places: Sequence[Place]) -> None:
    """Use or remove what a download of the client's that was killed left behind: it would never use it again itself."""
    left = {
        path: (file, place.cache)
        for place in places
        for file in place.files
        for path in _parts(repository_folder(place.cache, name) / "blobs", file)
    }
    if not left:
        return
    before = {path: _state(path) for path in left}
    time.sleep(QUIET_SECONDS)
    for path, (file, cache) in left.items():
        if before[path] is not None and _state(path) == before[path]:
            with suppress(OSError, TimeoutError):  # filelock's Timeout is one: somebody is at it
                _use_or_remove(name, cache, file, path)


def _parts(blobs: Path, file: RepoFile) -> list[Path]:
    return [path for path in blobs.glob(f"{file.blob}.*.incomplete") if _CLIENTS_PART.fullmatch(path.name)]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def _use_or_remove(name: str, cache: Path, file: RepoFile, path: Path) -> None:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    lock = _lock_path(cache, name, file)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock, timeout=0.1):
        kept = path.with_name(file.blob + ".incomplete")
        is_there = path.with_name(file.blob).exists()
        is_longer = not kept.exists() or kept.stat().st_size < path.stat().st_size
        if is_resumable(file) and not is_there and is_longer:
            path.replace(kept)
        else:
            path.unlink()
