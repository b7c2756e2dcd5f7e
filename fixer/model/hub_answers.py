"""Checks every answer of a hub before huggingface_hub makes a path of it, and while its body comes.

huggingface_hub names files in its cache by what the hub says: the ETag (file_download.py:1200 of 2.4.0), the commit
(:1201) and a listing's SHA-256 (:1915). A hub, a mirror or a proxy that answers `ETag: "../../x"` would so write
outside of the cache. A body could go on until the disk is full. `check_answers` puts these checks into the client that
huggingface_hub uses for all of its requests, through its own `set_client_factory` (`configure_http_backend` before
1.0). What hf_xet fetches does not pass here: its names and sizes come from a listing that did.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from fixer.base.errors import HubError
from fixer.model.hub import UnreachableError, is_commit

MOST_CONFIG_BYTES = 16 << 20
"""The largest body of a file whose size no listing said, such as config.json."""

MOST_FILE_BYTES = 8 << 40
"""The largest size of a file that is believed: 8 TiB, over ten times the largest public checkpoint."""

MOST_LISTING_BYTES = 256 << 20
"""All listings that one process reads, together; 50,000 files take some 20 MB."""

MOST_ERROR_BYTES = 1 << 20
"""The body of a redirect or of a refusal."""

SILENCE_SECONDS = 30.0
"""The longest silence of a hub where huggingface_hub itself sets no limit."""

_ADVICE = "check HF_ENDPOINT and the proxy: no hub answers so"
_NAME_IN_CACHE = re.compile(r"(?!\.)(?!.*\.\.)[A-Za-z0-9{}.:+=_-]{1,200}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILE = re.compile(r"/resolve/([^/]+)/(.+)")
_WAIT = re.compile(r"\bt=(\d{1,9})")


class BusyError(UnreachableError):
    """The hub has too many requests; `seconds` is the wait that it asks for, None where it names none."""

    def __init__(self, status: int, seconds: float | None) -> None:
        wait = "" if seconds is None else f", and asks to wait {seconds:.0f} s"
        hint = "wait, or set HF_TOKEN: who is known may ask more often"
        super().__init__(HubError(f"the hub has too many requests (status {status}){wait}", hint))
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """The part of a response that comes before its body, whichever library received it.

    Attributes:
        method: "GET" or "HEAD".
        url: what was asked for.
        status: the status code.
        headers: by name, whatever the case.
    """

    method: str
    url: str
    status: int
    headers: Mapping[str, str]

    @property
    def is_listing(self) -> bool:
        """Whether it answers a question about a repository, in JSON."""
        return self.method == "GET" and self.status < 300 and "/api/models/" in urlsplit(self.url).path

    @property
    def file(self) -> tuple[str, str]:
        """The revision and the name of the repository's file that was asked for, "" for none."""
        found = _FILE.search(urlsplit(self.url).path)
        return (unquote(found[1]), unquote(found[2])) if found else ("", "")


class Checks:
    """What this process knows of a hub's files, and what it has received.

    Attributes:
        sizes: bytes by commit and file name, from a listing.
        received: bytes of bodies that came over the wire.
    """

    def __init__(self) -> None:
        self.sizes: Mapping[tuple[str, str], int] = {}
        self.received = 0
        self._listed = 0
        self._thread = threading.local()  # the client asks for a file's head and its body in one thread

    def begin(self, answer: Answer) -> tuple[int, int | None]:
        """Check what comes before a body.

        Returns:
            The most bytes that the body may have; and the bytes that it must have, None where that is not known.

        Raises:
            HubError: the answer is none that a hub gives.
            BusyError: the hub has too many requests.
        """
        if answer.status in (429, 503):
            seconds = _wait(answer.headers)
            if answer.status == 429 or seconds is not None:  # else the client would sleep, and say nothing
                raise BusyError(answer.status, seconds)
        _check_commit(answer.headers)
        if answer.method == "HEAD":
            self._head(answer)
            return MOST_ERROR_BYTES, None
        if answer.status >= 300:
            return MOST_ERROR_BYTES, None
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise HubError("the hub packs what it was asked to send as it is", _ADVICE)
        if "/api/" in urlsplit(answer.url).path:
            return MOST_LISTING_BYTES - self._listed, None
        size: int | None = getattr(self._thread, "size", None)
        left = None if size is None else size - _first_byte(answer)
        return MOST_CONFIG_BYTES if left is None else left, left

    def body(self, pieces: Iterable[bytes], answer: Answer, most: int, wanted: int | None) -> Iterator[bytes]:
        """A body as it comes.

        Raises:
            HubError: it is longer than `most` bytes.
            UnreachableError: it ends before `wanted` bytes.
        """
        count = 0
        for piece in pieces:
            count += len(piece)
            self.received += len(piece)
            if answer.is_listing:
                self._listed += len(piece)
            if count > most:
                raise HubError(f"the hub sends more than the {most} bytes of {self._what(answer)}", _ADVICE)
            yield piece
        if wanted is not None and count < wanted:
            raise UnreachableError(HubError(f"the hub sent {count} of the {wanted} bytes of {self._what(answer)}"))

    def _head(self, answer: Answer) -> None:
        headers, file = answer.headers, answer.file
        name = file[1]
        if "x-repo-commit" in headers:  # else the client makes nothing of it
            _check_etag(headers.get("x-linked-etag") or headers.get("etag"))
        said = headers.get("x-linked-size") or (None if answer.status >= 300 else headers.get("content-length"))
        size = None if said is None else check_size(name, int(said) if re.fullmatch(r"-?\d{1,30}", said) else said)
        listed = self.sizes.get(file)
        if size is not None and listed is not None and size != listed:
            raise HubError(f"the hub lists {name} with {listed} bytes, and offers {size}", _ADVICE)
        if size is not None and listed is None and size > MOST_CONFIG_BYTES:
            raise HubError(f"{name} on the hub is larger than {MOST_CONFIG_BYTES >> 20} MiB")
        self._thread.name, self._thread.size = name, listed if size is None else size

    def _what(self, answer: Answer) -> str:
        return "a listing" if answer.is_listing else getattr(self._thread, "name", "") or "an answer"


CHECKS = Checks()
"""Those of this process: huggingface_hub has one client for all of it."""


def _wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that a refusal asks to wait: Retry-After, or t= of the hub's own RateLimit."""
    said = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", said):
        return float(said)
    found = _WAIT.search(headers.get("ratelimit", ""))
    return float(found[1]) if found else None


def _first_byte(answer: Answer) -> int:
    found = re.match(r"bytes (\d{1,15})-", answer.headers.get("content-range", "")) if answer.status == 206 else None
    return int(found[1]) if found else 0


def _check_commit(headers: Mapping[str, str]) -> None:
    commit = headers.get("x-repo-commit")
    if commit is not None and not is_commit(commit):
        raise HubError(f"the hub names the commit {commit[:60]!r}, which is none", _ADVICE)


def _check_etag(etag: str | None) -> None:
    """The ETag, as the client makes a file's name of it (file_download.py:606-625 of 2.4.0)."""
    if etag is not None and not _NAME_IN_CACHE.fullmatch(etag.removeprefix("W/").strip('"')):
        raise HubError(f"the hub sends the ETag {etag[:60]!r}, which is none", _ADVICE)


def check_size(name: str, size: object) -> int:
    """A file's size, if it is one.

    Raises:
        HubError: it is negative, no whole number, or larger than `MOST_FILE_BYTES`.
    """
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MOST_FILE_BYTES:
        raise HubError(f"the hub says that {name[:200]!r} has {str(size)[:40]!r} bytes", _ADVICE)
    return size


def check_listing(content: bytes) -> None:
    """Check what a hub says of a repository: commits, blob ids and sizes. Names are left to `weights.choose`.

    Raises:
        HubError: something in it is not of the form that every hub gives.
    """
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError):
        raise HubError("the hub's answer is not JSON", _ADVICE) from None
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict):
            raise HubError("the hub's listing has something in it that is no file", _ADVICE)
        name = str(row.get("path", ""))
        if "sha" in row and not (isinstance(row["sha"], str) and is_commit(row["sha"])):
            raise HubError(f"the hub names the commit {str(row['sha'])[:60]!r}, which is none", _ADVICE)
        for part in (row, row.get("lfs")):
            if not isinstance(part, dict):
                continue
            for key in ("oid", "sha256", "xetHash"):
                if part.get(key) is not None and not _HASH.fullmatch(str(part[key])):
                    raise HubError(f"the hub gives {name[:200]!r} the id {str(part[key])[:60]!r}", _ADVICE)
            if "size" in part:
                check_size(name, part["size"])


# --- the clients -----------------------------------------------------------------------------------------------------


@cache
def check_answers() -> None:
    """Have every answer that huggingface_hub receives in this process checked. A second call changes nothing."""
    import huggingface_hub

    if hasattr(huggingface_hub, "set_client_factory"):
        _check_httpx()
    else:
        _check_requests()


def _check_httpx() -> None:
    """For huggingface_hub 1.x (httpx) and 2.x (httpx2), which differ in nothing that is used here."""
    from huggingface_hub import get_session, set_client_factory

    first: Any = get_session()
    library: Any = sys.modules[type(first).__module__.split(".")[0]]

    class Body(library.SyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any, pieces: Iterator[bytes]) -> None:
            self._stream, self._pieces = stream, pieces

        def __iter__(self) -> Iterator[bytes]:
            return self._pieces

        def close(self) -> None:
            self._stream.close()

    def on_request(request: Any) -> None:
        request.headers["Accept-Encoding"] = "identity"

    def on_response(response: Any) -> None:
        answer = Answer(response.request.method, str(response.url), response.status_code, response.headers)
        most, wanted = CHECKS.begin(answer)
        if answer.status >= 300:
            response.headers.pop("content-encoding", None)  # whatever it is, it is not unpacked
        response.stream = Body(response.stream, CHECKS.body(response.stream, answer, most, wanted))
        if answer.is_listing:
            check_listing(response.read())

    hooks = {name: list(first.event_hooks[name]) for name in ("request", "response")}
    hooks["request"].append(on_request)
    hooks["response"].append(on_response)
    set_client_factory(lambda: type(first)(event_hooks=hooks, follow_redirects=True, timeout=SILENCE_SECONDS))


def _check_requests() -> None:
    """For huggingface_hub 0.x (requests)."""
    import huggingface_hub

    hub: Any = huggingface_hub
    configure_http_backend, get_session = hub.configure_http_backend, hub.get_session

    first: Any = get_session()
    kind: Any = type(first.get_adapter("https://"))  # its own, which knows HF_HUB_OFFLINE

    class Adapter(kind):  # type: ignore[misc]
        def send(self, request: Any, stream: bool = False, timeout: Any = None, **more: Any) -> Any:
            request.headers["Accept-Encoding"] = "identity"
            response = super().send(request, stream=stream, timeout=timeout or SILENCE_SECONDS, **more)
            answer = Answer(request.method, request.url, response.status_code, response.headers)
            most, wanted = CHECKS.begin(answer)
            if answer.status >= 300:
                response.raw.headers.pop("content-encoding", None)
            pieces = response.raw.stream
            response.raw.stream = lambda *a, **k: CHECKS.body(pieces(*a, **k), answer, most, wanted)
            if answer.is_listing:
                check_listing(response.content)
            return response

    def session() -> Any:
        new: Any = type(first)()
        new.mount("http://", Adapter())
        new.mount("https://", Adapter())
        return new

    configure_http_backend(session)
