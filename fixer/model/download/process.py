"""A repository's download, in a process of its own, so that it can be ended at any moment and its memory goes with it.

What happens is told on standard output, one message a line. huggingface_hub does the work; it reads HF_ENDPOINT,
HF_TOKEN, HF_HOME and its other variables itself. Releases since 1.x throw away a large file's beginning when the
connection breaks or the process ends; so large files that come over plain HTTP are fetched with the client's own
function for that, but into a file that stays (`blobs/<sha256>.incomplete`, as earlier releases named it).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fixer.base.errors import HubError, MoefixError, StoreError
from fixer.model.hub import UnreachableError, commit_in_cache, hub_cache, is_commit, refusal, repository_folder, snapshot_folder
from fixer.artefacts.shelf import write_atomically
from fixer.model.download.weights import Presence, RepoFile, choose, is_safe, presence

TELL_INTERVAL = 0.5
"""Seconds between two messages of how much has come."""

PAUSES = (2.0, 5.0, 15.0)
"""Seconds before each further attempt; one that brought something starts the count anew."""

AT_A_TIME = 8
"""Files, as many as the client fetches at a time."""

QUIET_SECONDS = 3.0
"""A part of a file that does not grow for so long, and whose lock is free, belongs to nobody any more."""

MOST_FILES = 50_000
"""No model's repository has more files."""

_KEPT_HINT = "start again: what has come is kept"


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What to fetch.

    Attributes:
        name: the repository, "owner/name".
        revision: as the user gave it; None for the default branch.
        commit: what the revision stands for; None where that is still to be asked.
        load_format: SGLang's.
        download_dir: SGLang's cache of its own for weights; None for the client's.
        code: fetch the model's Python files too.
    """

    name: str
    revision: str | None
    commit: str | None
    load_format: str
    download_dir: str | None = None
    code: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be fetched: the commit; how many files; bytes that are there, of how many; where to."""

    commit: str
    files: int
    done: int
    total: int
    folder: str


@dataclass(frozen=True)
class Bytes:
    """How far it is."""

    done: int
    total: int


@dataclass(frozen=True)
class Trouble:
    """What went wrong, and after how many seconds it is tried again."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Done:
    """Every file is there.

    Attributes:
        commit: the commit.
        files: paths of all files, in the caches' snapshot folders.
    """

    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """It ended without all files; `lasting` where another attempt could not help."""

    message: str
    hint: str
    exit_code: int
    lasting: bool


Message = Plan | Bytes | Trouble | Done | Failed
Tell = Callable[[Message], None]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Plan, Bytes, Trouble, Done, Failed)}


def to_line(message: Message) -> str:
    """A message as a line of JSON."""
    return json.dumps({"say": type(message).__name__, **asdict(message)}) + "\n"


def from_line(line: str) -> Message | None:
    """The message in a line; None where it is none."""
    with suppress(ValueError, TypeError, KeyError):
        row = json.loads(line)
        kind = _KINDS[row.pop("say")]
        values = {field.name: row[field.name] for field in fields(kind)}
        message: Message = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        return message
    return None


# --- the process -----------------------------------------------------------------------------------------------------


def main() -> None:
    """The process's life: a request as JSON and the parent's process id as arguments, messages on standard output."""
    from fixer.machine.worker import die_with_parent

    request, parent = Request(**json.loads(sys.argv[1])), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    # Whatever a library prints goes nowhere; only messages go to the parent.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        lock = threading.Lock()

        def tell(message: Message) -> None:
            with lock:
                try:
                    out.write(to_line(message))
                    out.flush()
                except OSError:  # nobody reads any more
                    os._exit(1)

        tell(fetch(request, tell))
        os._exit(0)  # threads of the transfer may still be winding up


def fetch(request: Request, tell: Tell) -> Done | Failed:
    """Fetch what the request names, trying again where that may help.

    Returns:
        Whether all is there. Never raises what can be foreseen.
    """
    attempt = Attempt(request, tell)
    failures = 0
    while True:
        before = attempt.progress()
        try:
            return attempt.run()
        except Exception as error:  # the client's own, its transport's, or the file system's
            fault = fault_of(request, error, moved=attempt.progress() > before)
        if not isinstance(fault, UnreachableError):
            return Failed(fault.message, fault.hint, fault.exit_code, lasting=True)
        if attempt.has_weights():
            return Failed(fault.error.message, fault.error.hint, HubError.exit_code, lasting=False)
        failures = 0 if attempt.progress() > before else failures + 1
        if failures > len(PAUSES):
            return Failed(fault.error.message, _hint(fault, attempt), HubError.exit_code, lasting=False)
        pause = PAUSES[max(0, failures - 1)]
        tell(Trouble(fault.error.message, pause))
        time.sleep(pause)


def _hint(fault: UnreachableError, attempt: Attempt) -> str:
    return f"{fault.error.hint}; {_KEPT_HINT}" if attempt.progress() else fault.error.hint


def fault_of(request: Request, error: BaseException, *, moved: bool) -> MoefixError | UnreachableError:
    """What an exception during a download means, without addresses or tokens.

    Args:
        request: what was to be fetched.
        error: the exception.
        moved: whether bytes came before it.
    """
    from huggingface_hub import errors

    if isinstance(error, (MoefixError, UnreachableError)):
        return error
    where = request.download_dir or hub_cache()
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if number in {errno.ENOSPC, errno.EDQUOT} or "os error 28" in str(each):
            return HubError(f"no space is left in {where} for {request.name}", f"free some there; {_ELSEWHERE}")
        if number in {errno.EACCES, errno.EPERM, errno.EROFS} and isinstance(each, OSError) and each.filename:
            return StoreError(f"{where} cannot be written: {each.strerror}", f"give it to this user; {_ELSEWHERE}")
    if not any(isinstance(each, OSError) or _is_the_clients(each) for each in _chain(error)):
        return HubError(f"the download of {request.name} failed: {type(error).__name__}", "give --moefix-skip-download")
    answered = any(getattr(each, "response", None) is not None for each in _chain(error))
    if moved and not answered and not isinstance(error, errors.LocalEntryNotFoundError):
        return UnreachableError(HubError(f"the connection to the hub broke off for {request.name}", _CHECK))
    return refusal(request.name, request.revision, error)


_ELSEWHERE = "or name another folder with HF_HOME or --download-dir"
_CHECK = "check the network"


def _is_the_clients(error: BaseException) -> bool:
    """Whether an exception is the client's, its transport's or hf_xet's (which raises RuntimeError)."""
    return isinstance(error, RuntimeError) or type(error).__module__.split(".")[0] in _CLIENTS


_CLIENTS = frozenset({"huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# --- what is there ---------------------------------------------------------------------------------------------------


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


# --- one attempt -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A cache folder, and what of the repository goes there."""

    cache: Path
    files: tuple[RepoFile, ...]


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


def bytes_there(name: str, commit: str, place: Place) -> int:
    """Bytes of a place's files that have come, those of unfinished files among them."""
    folder = snapshot_folder(place.cache, name, commit)
    blobs = _sizes(repository_folder(place.cache, name) / "blobs")
    parts: dict[str, int] = {}
    for entry, size in blobs.items():
        if entry.endswith(".incomplete"):
            blob = entry.partition(".")[0]
            parts[blob] = max(size, parts.get(blob, 0))
    return sum(
        file.size if file.blob in blobs or (folder / file.path).exists() else min(file.size, parts.get(file.blob, 0))
        for file in place.files
    )


def _sizes(folder: Path) -> dict[str, int]:
    """Names and sizes on the disk. hf_xet writes in any order, and what it has not written takes no space."""
    sizes = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                about = entry.stat()
                sizes[entry.name] = min(about.st_size, about.st_blocks * 512)
    return sizes


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
                f"free some there; {_ELSEWHERE}",
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
        for waiting in [pool.submit(_get_large, name, commit, place.cache, file) for file in large]:
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
        raise UnreachableError(HubError(f"{len(lacking)} files of {name} did not come", _CHECK))


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


# --- large files over plain HTTP -------------------------------------------------------------------------------------


def is_resumable(file: RepoFile) -> bool:
    """Whether a file comes in one stream from its first byte to its last."""
    from huggingface_hub import constants

    has_xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    return file.is_large and not (file.is_xet and has_xet)


def _get_large(name: str, commit: str, cache: Path, file: RepoFile) -> None:
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
            raise UnreachableError(HubError(f"what came of {file.path} is not what the hub has", _KEPT_HINT))
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
