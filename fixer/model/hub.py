"""What a hub says, in moefix's words: names, commits and refusals, without addresses or tokens."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from fixer.base.errors import HubError
from fixer.model.hub_answers import check_answers

OFFLINE_HINT = "check the network and HF_ENDPOINT, or give --model a folder"

# What the hub's status codes mean to a user.
_STATUS: Mapping[int, tuple[str, str]] = {
    401: ("is not there, or needs a token that may read it", "check the name, or set HF_TOKEN"),
    403: ("is gated, and this token may not read it", "accept its terms on the hub and set HF_TOKEN"),
    404: ("is not on the hub", "check the name and --revision"),
}

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class UnreachableError(Exception):
    """The hub could not be asked or gave no answer, which may pass; `error` says why."""

    def __init__(self, error: HubError) -> None:
        super().__init__(error.message)
        self.error = error


class NoSuchFileError(HubError):
    """The repository is there, the file is not."""


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository: "owner/name"."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def may_be_folder(name: str) -> bool:
    """Whether a model's name may mean a folder of this machine, with `~` expanded.

    "owner/name" is a name on a hub, whatever the working folder is and whoever may enter it, unless a file of that name
    or a readable config.json in a folder of that name lies there.
    """
    path = os.path.expanduser(name)
    return not is_hub_id(name) or os.path.isfile(path) or os.access(os.path.join(path, "config.json"), os.R_OK)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit: it never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def uses_modelscope(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLang takes models from ModelScope (environ.py:125-133, 254 of SGLang 0.5.17)."""
    return environ.get("SGLANG_USE_MODELSCOPE", "").lower() in {"true", "1", "yes", "y"}


def commit_of(path: Path) -> str | None:
    """The commit of a file in the hub's cache (.../snapshots/<commit>/<file>), None for any other file."""
    folders = path.parts
    places = [place for place, name in enumerate(folders[:-1]) if name == "snapshots"]
    commit = folders[places[-1] + 1] if places else None
    return commit if is_commit(commit) else None


def refusal(name: str, revision: str | None, error: BaseException, filename: str = "") -> HubError | UnreachableError:
    """A client's exception in our own words.

    Args:
        name: the repository.
        revision: the revision that was asked for.
        error: the exception, huggingface_hub's own or its transport's (which differs by version).
        filename: the file that was asked for.
    """
    from huggingface_hub import errors

    if isinstance(error, (HubError, UnreachableError)):
        return error  # what the answer was refused for
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None and _status(error.__cause__):
        error = error.__cause__  # the client puts its own in front of what the hub said
    at = f"{name} at revision {revision}" if revision else name
    for kind, status in (
        (errors.GatedRepoError, 403),
        (errors.RevisionNotFoundError, 404),
        (errors.RepositoryNotFoundError, 401),
    ):
        if isinstance(error, kind):
            known = _status(error) if kind is errors.RepositoryNotFoundError else status
            what, hint = _STATUS.get(known, _STATUS[status])
            return HubError(f"{at} {what}", hint)
    is_local = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.EntryNotFoundError) and not is_local:
        return NoSuchFileError(f"{at} has no {filename}".rstrip(), "moefix needs a model in Hugging Face's format")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{at} is no name that the hub takes", "check the name and --revision")
    status_code = _status(error)
    if status_code in _STATUS:
        what, hint = _STATUS[status_code]
        return HubError(f"{at} {what}", hint)
    said = f"answered with status {status_code}" if status_code else "is out of reach"
    what = f"{at} is not in the cache, and the hub is out of reach" if is_local else f"the hub {said} for {at}"
    return UnreachableError(HubError(what, OFFLINE_HINT))


def _status(error: BaseException) -> int:
    code = getattr(getattr(error, "response", None), "status_code", 0)
    return code if isinstance(code, int) else 0


# --- the client's cache (its layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache) ----------------


def hub_cache() -> Path:
    """The client's cache folder, as HF_HOME and HF_HUB_CACHE say."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(cache: Path, name: str) -> Path:
    """Where the cache keeps a model's repository."""
    return cache / "--".join(("models", *name.split("/")))


def snapshot_folder(cache: Path, name: str, commit: str) -> Path:
    """Where the cache shows a commit's files under their names."""
    return repository_folder(cache, name) / "snapshots" / commit


def commit_in_cache(cache: Path, name: str, revision: str | None) -> str | None:
    """The commit that the cache knows for a branch, a tag or a commit; None where it knows none."""
    if is_commit(revision):
        return revision
    try:
        text = (repository_folder(cache, name) / "refs" / (revision or "main")).read_text(encoding="ascii")[:64].strip()
    except (OSError, ValueError):
        return None
    return text if is_commit(text) else None


_T = TypeVar("_T")


@dataclass(frozen=True)
class Hub:
    """How to reach the hub; the defaults leave everything to huggingface_hub and its environment variables.

    Attributes:
        endpoint: the hub's address, None for HF_ENDPOINT or the public hub.
        token: an access token, None for HF_TOKEN or the stored one; never printed.
        cache: the cache folder, None for HF_HOME's.
        timeout_s: seconds for one answer.
        deadline_s: seconds for one file altogether.
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    cache: Path | None = None
    timeout_s: float = 8.0
    deadline_s: float = 30.0


class _Fetched(NamedTuple):
    """A file of a repository, and its commit; whether the hub was out of reach, so that it is the cache's."""

    path: Path
    commit: str | None
    from_cache: bool = False


def fetch(name: str, filename: str, revision: str | None, hub: Hub) -> _Fetched:
    """One file of a repository on the hub, out of the client's cache where it is there; and its commit.

    Raises:
        HubError: the hub says no.
        UnreachableError: it says nothing, and the cache does not have the file.
    """
    try:
        return before(hub.deadline_s, lambda late: _download(name, filename, revision, hub, late))
    except (HubError, UnreachableError):
        raise
    except Exception as error:  # the client's own, its transport's (which differs by version), or a full disk
        raise refusal(name, revision, error, filename) from None


def _download(name: str, filename: str, revision: str | None, hub: Hub, late: threading.Event) -> _Fetched:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    check_answers()

    def cached() -> _Fetched:
        path = Path(
            hf_hub_download(
                name, filename, revision=revision, cache_dir=hub.cache, token=hub.token, local_files_only=True
            )
        )
        return _Fetched(path, commit_of(path) or revision, not constants.HF_HUB_OFFLINE)

    if constants.HF_HUB_OFFLINE:
        return cached()
    url = hf_hub_url(name, filename, revision=revision, endpoint=hub.endpoint)
    try:
        about = get_hf_file_metadata(url, token=hub.token, timeout=hub.timeout_s)
    except Exception as error:
        refused = refusal(name, revision, error, filename)
        if not isinstance(refused, UnreachableError):
            raise refused from None
        try:
            return cached()
        except Exception:  # not in the cache either: the first fault is the one to tell
            raise refused from None
    if late.is_set():  # nobody waits any more: spare the client's own retries
        raise UnreachableError(HubError(f"the hub was too slow for {name}", OFFLINE_HINT))
    path = hf_hub_download(
        name,
        filename,
        revision=revision,  # not the commit: the cache files what "main" is only when asked for it
        endpoint=hub.endpoint,
        token=hub.token,
        cache_dir=hub.cache,
        etag_timeout=hub.timeout_s,
    )
    return _Fetched(Path(path), about.commit_hash or revision)


def before(seconds: float, task: Callable[[threading.Event], _T]) -> _T:
    """The task's result, or `UnreachableError` after that many seconds, however slowly bytes trickle in.

    The task is given an event that says that nobody waits for it any more.
    """
    late = threading.Event()
    results: list[_T] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(task(late))
        except Exception as error:  # handed over to the caller's thread
            faults.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(seconds)
    late.set()
    if faults:
        raise faults[0]
    if not results:
        raise UnreachableError(HubError(f"the hub gave no answer within {seconds:g} s", OFFLINE_HINT))
    return results[0]
