"""A local hub for the real client: model info, file lists, files with ranges; slow, broken off, refusing or hostile.

Imported by name in child processes, so it must stay free of pytest.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
LARGE = 1 << 20
"""Files from this size on are kept as large ones (LFS), by their sha256."""

BLOCK = 1 << 16


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, always the same."""
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True)
class Body:
    """What a hostile hub sends for a file, in the place of its content and of what its HEAD announced.

    Attributes:
        pieces: the bytes, one piece after the other, as slowly as the iterator is.
        headers: by name; no Content-Length unless it is among them.
    """

    pieces: Callable[[], Iterator[bytes]]
    headers: Mapping[str, str] = field(default_factory=dict)


class Site:
    """What the hub has, and how it behaves; every attribute may be changed while it serves.

    Attributes:
        files: the repository's, whatever its name is asked for.
        revisions: commits by branch or tag.
        refuse: gives a status and an error code for a path (without the query), or None.
        delay: seconds before each answer.
        rate: bytes a second for each large file, 0 for as fast as it goes.
        rates: the same, by file.
        cuts: by file, after how many bytes each further answer breaks off.
        lengths: by file, a Content-Length that is not the file's.
        heads: headers for every answer to HEAD, in the place of the true ones.
        bodies: by file, what is sent for it.
        rows: changes the listing.
        retry: headers of every refusal.
        requests: "GET /path" in order.
        tokens: every Authorization header.
        sent: body bytes by file.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.revisions = {"main": COMMIT}
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda path: None
        self.delay = 0.0
        self.rate = 0.0
        self.rates: dict[str, float] = {}
        self.cuts: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.heads: dict[str, str] = {}
        self.bodies: dict[str, Body] = {}
        self.rows: Callable[[list[dict[str, object]]], object] = lambda rows: rows
        self.retry: dict[str, str] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.sent: Counter[str] = Counter()
        self._hashes: dict[str, str] = {}

    def commit(self, revision: str) -> str | None:
        """What a revision stands for."""
        return revision if revision in self.revisions.values() else self.revisions.get(revision)

    def hash(self, name: str) -> str:
        """A file's name in the client's cache: sha256 of a large one, git's hash of a small one."""
        content = self.files[name]
        if name not in self._hashes:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._hashes[name] = hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git
        return self._hashes[name]

    def listing(self) -> list[dict[str, object]]:
        """The tree, as the hub's API gives it."""
        rows = []
        for name, content in self.files.items():
            row: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
            if len(content) >= LARGE:
                row["lfs"] = {"oid": self.hash(name), "size": len(content), "pointerSize": 134}
            else:
                row["oid"] = self.hash(name)
            rows.append(row)
        return rows


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_args: object) -> None:
        pass

    def _answer(self) -> None:
        site, path = self.site, unquote(urlsplit(self.path).path)
        site.requests.append(f"{self.command} {path}")
        site.tokens.add(self.headers.get("Authorization", ""))
        time.sleep(site.delay)
        refused = site.refuse(path)
        if refused is not None:
            return self._refuse(*refused)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api(parts[4:])
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file(parts[3], "/".join(parts[4:]))
        return self._refuse(404, "RepoNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in self.site.retry.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _api(self, parts: list[str]) -> None:
        commit = self.site.commit("/".join(parts[1:]) or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        about = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in self.site.files]}
        content = json.dumps(self.site.rows(self.site.listing()) if parts[:1] == ["tree"] else about).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _file(self, revision: str, name: str) -> None:
        site, commit = self.site, self.site.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if name not in site.files:
            return self._refuse(404, "EntryNotFound")
        content = site.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {
            "ETag": f'"{site.hash(name)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Length": str(site.lengths.get(name, len(content) - start)),
        }
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = site.bodies.get(name) if self.command == "GET" else None
        if self.command == "HEAD":
            headers |= site.heads
        if body is not None:
            headers = {"ETag": headers["ETag"], **body.headers}
        self.send_response(206 if "Range" in self.headers and body is None else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body is not None:
            self._send_body(name, body)
        elif self.command == "GET":
            self._send(name, content[start:])
        return None

    def _send_body(self, name: str, body: Body) -> None:
        with suppress(OSError):  # the client is gone
            for piece in body.pieces():
                self.wfile.write(piece)
                self.site.sent[name] += len(piece)
        self.close_connection = True

    def _send(self, name: str, content: bytes) -> None:
        site = self.site
        rate = site.rates.get(name, site.rate)
        most = site.cuts[name].pop(0) if site.cuts.get(name) else len(content)
        began, sent = time.monotonic(), 0
        try:
            while sent < min(most, len(content)):
                block = content[sent : min(most, sent + BLOCK)]
                self.wfile.write(block)
                sent += len(block)
                site.sent[name] += len(block)
                if rate and len(content) >= BLOCK:
                    time.sleep(max(0.0, sent / rate - (time.monotonic() - began)))
        except OSError:
            pass  # the client is gone
        if most < len(content):
            self.close_connection = True
            self.connection.close()


@contextmanager
def serve(site: Site) -> Iterator[str]:
    """Serve, and give the address for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
