"""What a hub says, in moefix's words: names, commits and refusals, without addresses or tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fixer.base.errors import HubError

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
