"""One attempt at a download, with the space check before it."""

from __future__ import annotations

import glob
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fixer.base.errors import HubError, StoreError
from fixer.base.files import write_atomically
from fixer.model.download.cached import Place, bytes_there, cached
from fixer.model.download.large_files import get_large, is_resumable, tidy
from fixer.model.download.messages import Bytes, Done, Plan, Request, Tell
from fixer.model.download.weights import Presence, RepoFile, choose, is_safe
from fixer.model.hub import UnreachableError, hub_cache, is_commit, repository_folder, snapshot_folder

TELL_INTERVAL = 0.5
"""Seconds between two messages of how much has come."""


AT_A_TIME = 8
"""Files, as many as the client fetches at a time."""


MOST_FILES = 50_000
"""No model's repository has more files."""


ELSEWHERE = "or name another folder with HF_HOME or --download-dir"


CHECK = "check the network"


class Attempt:
    """Attempts at a request; what one found out the next need not ask again.

    Args:
        request: what to fetch.
        tell: is given each message.
    """

    def __init__(self, request: Request, tell: Tell) -> None:
        self.request, self._tell = request, tell
        self._commit = request.commit
        self._places: tuple[Place, ...] = ()

    def run(self) -> Done:
        """Fetch what is missing.

        Raises:
            HubError, StoreError: another attempt could not help.
            Exception: whatever else; it may help.
        """
        request = self.request
        commit = self._commit = self._commit or _resolve(request)
        self._places = self._places or _places(request, _listing(request.name, commit))
        tidy(request.name, self._places)
        _check_space(request, self._places, commit)
        count = sum(len(place.files) for place in self._places)
        where = str(self._places[-1].cache)
        self._tell(Plan(commit, count, self.progress(), self._total(), where))
        with self._telling():
            for place in self._places:
                _fill(request.name, commit, place)
        for place in self._places:
            _point(place.cache, request, commit)
        self._tell(Bytes(self._total(), self._total()))
        paths: list[str] = []
        for place in self._places:
            folder = snapshot_folder(place.cache, request.name, commit)
            paths += [str(folder / file.path) for file in place.files]
        return Done(commit, tuple(paths))

    def progress(self) -> int:
        """Bytes that are there."""
        if self._commit is None:
            return 0
        return sum(bytes_there(self.request.name, self._commit, place) for place in self._places)

    def has_weights(self) -> bool:
        """Whether all weights are there, whatever the hub might have besides."""
        asked = self.request
        revision = self._commit or asked.revision
        return cached(asked.name, revision, asked.load_format, asked.download_dir)[1] is Presence.COMPLETE

    def _total(self) -> int:
        return sum(file.size for place in self._places for file in place.files)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(TELL_INTERVAL):
                self._tell(Bytes(min(self.progress(), self._total()), self._total()))

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()


def _resolve(request: Request) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().repo_info(request.name, revision=request.revision).sha
    if commit is None or not is_commit(commit):
        raise UnreachableError(HubError(f"the hub names no commit for {request.name}", "check HF_ENDPOINT"))
    return commit


def _listing(name: str, commit: str) -> list[RepoFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile as Listed

    files = []
    for entry in HfApi().list_repo_tree(name, recursive=True, revision=commit):
        if isinstance(entry, Listed):
            is_xet = getattr(entry, "xet_hash", None) is not None
            blob = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            files.append(RepoFile(entry.path, entry.size, blob, entry.lfs is not None, is_xet))
        if len(files) > MOST_FILES:
            raise HubError(f"{name} has more than {MOST_FILES} files", "is it a model?")
    return [file for file in files if re.fullmatch(r"[0-9a-f]{40,64}", file.blob)]


def _places(request: Request, files: Sequence[RepoFile]) -> tuple[Place, ...]:
    """Where what goes. SGLang looks for weights and JSON in `--download-dir`, for all else in the client's cache."""
    moves = request.revision is not None and not is_commit(request.revision)
    choice = choose(files, request.name, request.load_format, moves=moves, code=request.code)
    if not choice.weights:
        raise HubError(
            f"{request.name} has no weights that SGLang loads with load format {request.load_format}",
            "check --load-format; to have SGLang look itself, give --moefix-skip-download",
        )
    if request.download_dir is None:
        return (Place(hub_cache(), (*choice.small, *choice.weights)),)
    own = Path(request.download_dir).expanduser().resolve()
    json_files = tuple(file for file in choice.small if file.path.endswith(".json"))
    return Place(hub_cache(), choice.small), Place(own, (*json_files, *choice.weights))


def _check_space(request: Request, places: Sequence[Place], commit: str) -> None:
    """Say that a disk is too small before it is full.

    Raises:
        HubError: it is.
    """
    for place in places:
        missing = sum(file.size for file in place.files) - bytes_there(request.name, commit, place)
        folder = next(folder for folder in (place.cache, *place.cache.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise HubError(
                f"{request.name} needs {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free in {place.cache}",
                f"free some there; {ELSEWHERE}",
            )


def _fill(name: str, commit: str, place: Place) -> None:
    """Fetch a place's missing files."""
    from huggingface_hub import snapshot_download

    folder = snapshot_folder(place.cache, name, commit)
    missing = [file for file in place.files if not (folder / file.path).exists()]
    if not missing:
        return
    large = [file for file in missing if is_resumable(file)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for waiting in [pool.submit(get_large, name, commit, place.cache, file) for file in large]:
            waiting.result()
    snapshot_download(
        name,
        revision=commit,
        cache_dir=place.cache,
        allow_patterns=[glob.escape(file.path) for file in missing],
        max_workers=AT_A_TIME,
    )
    # Without the hub the client gives what the cache has, and says nothing.
    lacking = [file.path for file in missing if not (folder / file.path).exists()]
    if lacking:
        raise UnreachableError(HubError(f"{len(lacking)} files of {name} did not come", CHECK))


def _point(cache: Path, request: Request, commit: str) -> None:
    """Have the cache know the commit by the name that SGLang asks for, as the client does when it asks by name."""
    revision = request.revision or "main"
    if is_commit(revision) or not is_safe(revision):
        return
    path = repository_folder(cache, request.name) / "refs" / revision
    with suppress(OSError, ValueError):
        if path.read_text(encoding="ascii") == commit:
            return
    with suppress(StoreError):  # a cache that cannot be written, and has all
        write_atomically(path, commit.encode())
