"""Fetch one small file of a model from the hub, with a deadline, or find it in the hub's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from fixer.base.errors import HubError
from fixer.model.hub import OFFLINE_HINT, UnreachableError, commit_of, refusal
from fixer.model.hub_answers import check_answers

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
