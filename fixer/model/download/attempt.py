"""One attempt at a download, with the space check before it."""

from __future__ import annotations

import fcntl
import glob
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fixer.base.errors import HubError, StoreError
from fixer.base.files import write_atomically
from fixer.model.download.cached import Place, bytes_there, cached, total_bytes
from fixer.model.download.messages import Bytes, Done, Plan, Request, Tell, Trouble
from fixer.model.download.weights import Presence, RepoFile, choose, is_safe
from fixer.model.hub import UnreachableError, hub_cache, is_commit, repository_folder, snapshot_folder
from fixer.model.hub_answers import CHECKS, check_answers

QUIET_SECONDS = 30.0
"""Seconds without a byte after which that is said."""

TELL_INTERVAL = 0.5
"""Seconds between two messages of how much has come."""


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
        self._began = time.time()

    def run(self) -> Done:
        """Fetch what is missing.

        Raises:
            HubError, StoreError: another attempt could not help.
            Exception: whatever else; it may help.
        """
        with self._telling():
            request = self.request
            commit = self._commit = self._commit or _resolve(request)
            places = self._places or _places(request, listing(request.name, commit))
            remove_leftovers(request.name, places)
            _check_space(request, places, commit)
            count, total = sum(len(place.files) for place in places), total_bytes(places)
            done = sum(bytes_there(request.name, commit, place) for place in places)
            self._tell(Plan(commit, count, done, total, str(places[-1].cache)))
            self._places = places
            for place in places:
                _fill(request.name, commit, place)
                _point(place.cache, request, commit)
        self._tell(Bytes(total, total))
        folders = [(snapshot_folder(place.cache, request.name, commit), place.files) for place in places]
        return Done(commit, tuple(str(folder / file.path) for folder, files in folders for file in files))

    def progress(self) -> int:
        """Bytes that are there, those of unfinished files among them."""
        if self._commit is None:
            return 0
        return sum(bytes_there(self.request.name, self._commit, place, self._began) for place in self._places)

    def has_weights(self) -> bool:
        """Whether all weights are there, whatever the hub might have besides."""
        asked = self.request
        revision = self._commit or asked.revision
        return cached(asked.name, revision, asked.load_format, asked.download_dir)[1] is Presence.COMPLETE

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell every `TELL_INTERVAL` how far it is, and once for each silence that nothing comes."""
        over = threading.Event()

        def tell() -> None:
            seen, since, is_said = (0, 0), time.monotonic(), False
            while not over.wait(TELL_INTERVAL):
                now, have = time.monotonic(), (self.progress(), CHECKS.received)
                if have != seen:
                    seen, since, is_said = have, now, False
                elif now - since > QUIET_SECONDS and not is_said:
                    is_said = True
                    self._tell(Trouble(f"nothing has come from the hub for {now - since:.0f} s: waiting", 0.0))
                if self._places:
                    total = total_bytes(self._places)
                    self._tell(Bytes(min(have[0], total), total))

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


def listing(name: str, revision: str, endpoint: str | None = None) -> list[RepoFile]:
    """A repository's files.

    Raises:
        HubError: it has more than `MOST_FILES`, or the hub's answer is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile as Listed

    check_answers()
    files = []
    for entry in HfApi(endpoint=endpoint).list_repo_tree(name, recursive=True, revision=revision):
        if isinstance(entry, Listed):
            blob = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            files.append(RepoFile(entry.path, entry.size, blob))
        if len(files) > MOST_FILES:
            raise HubError(f"{name} has more than {MOST_FILES} files", "is it a model?")
    CHECKS.sizes = {(revision, file.path): file.size for file in files}
    return files


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
    snapshot_download(
        name,
        revision=commit,
        cache_dir=place.cache,
        allow_patterns=[glob.escape(file.path) for file in missing],
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


LEFTOVER_SECONDS = 60.0
"""A part of a file that nobody has written to for so long, and whose lock is free, belongs to nobody any more."""

PART = re.compile(r"([0-9a-f]{40,64})\.[0-9a-f]{8}\.incomplete")
"""A file that the client is fetching. After a kill it would never use it again, nor remove it (since 1.x)."""


def remove_leftovers(name: str, places: Sequence[Place]) -> None:
    """Remove the parts of these files that killed downloads left, or each further start would leave more of them."""
    for place in places:
        blobs = {file.blob for file in place.files}
        folder = repository_folder(place.cache, name)
        locks = place.cache / ".locks" / folder.name
        for path in (folder / "blobs").glob("*.incomplete"):
            part = PART.fullmatch(path.name)
            with suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
                if part and part[1] in blobs and is_old and _is_free(locks / f"{part[1]}.lock"):
                    path.unlink()


def _is_free(lock: Path) -> bool:
    """Whether no client holds its lock on a file: it keeps it (flock) for as long as it fetches that."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
