"""Read the records of other runs, and ask their servers how they are."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from fixer.base.data_folder import DataFolder
from fixer.base.files import read_bounded
from fixer.base.locks import is_held
from fixer.base.running_servers import may_serve, running_servers
from fixer.base.status import Phase, Share, Status, lock_path, state_path


def states(home: Path) -> tuple[Status, ...]:
    """The state of every moefix that wrote one into this data folder and can be read, the newest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in (DataFolder(home).run).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                found.append(Status.from_json(read_bounded(path)))
    return tuple(sorted(found, key=lambda status: (status.updated, status.started), reverse=True))


KEPT_SECONDS = 24 * 3600.0
"""How long the state of a process that has ended is shown before its file is removed."""


HEALTH_SECONDS = 4.0
"""How long a server may take to answer /health."""


OVER = (Phase.ENDED, Phase.FAILED)


def current_states(home: Path, begins: Status | None = None) -> tuple[Status, ...]:
    """The states in a data folder as they are now: this host's first, the newest first.

    A process that is gone without a word has ended: one whose lock is free, or one of this host without a lock that
    does not run. Files of processes that ended long ago are removed.

    Args:
        begins: a run that begins. Ended ones of its host and process id are removed: a container that restarts is
            process 1 each time, and would leave a file for each restart of a day.
    """
    here = socket.gethostname()
    found = []
    for status in states(home):
        now, path = status, state_path(home, status.run)
        if status.phase not in OVER and not _lives(status, path, here):
            now = replace(status, phase=Phase.ENDED, detail=f"gone while {status.phase.value}")
        same = begins is not None and (status.host, status.pid) == (begins.host, begins.pid)
        if now.phase in OVER and (same or _age(status.updated) > KEPT_SECONDS):
            for file in (path, lock_path(path)):
                with contextlib.suppress(OSError):
                    file.unlink()
            continue
        found.append(now)
    return tuple(sorted(found, key=lambda status: status.host != here))


def _lives(status: Status, path: Path, here: str) -> bool:
    held = is_held(lock_path(path))
    if held is None:
        return status.host != here or is_alive(status.pid)
    return held


def _age(stamp: str) -> float:
    """Seconds since a time as artefacts write it; 0 for one that makes no sense."""
    try:
        then = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return 0.0
    return (datetime.now(timezone.utc) - then).total_seconds()


def is_alive(pid: int) -> bool:
    """Whether a process of that id runs moefix or SGLang: ids are used again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, IndexError):
        return False
    return state != "Z" and any(word in command for word in (b"moefix", b"entrypoint.py", b"sglang"))


def share_text(share: Share | None) -> str:
    """How far a piece of work is, in a few words; "" where nothing is known."""
    if share is None:
        return ""
    if share.total <= 0:
        return f"{share.done} {share.unit}"
    part = f"{100 * min(share.done, share.total) // share.total} %"
    return part if share.unit == "bytes" else f"{part}, {share.done} of {share.total} {share.unit}"


def summary(status: Status) -> str:
    """The phase and how far it is, in one line."""
    share = {Phase.TUNING: status.tuning, Phase.DOWNLOADING: status.download}.get(status.phase)
    parts = filter(None, (share_text(share), status.detail))
    rest = ", ".join(parts)
    return f"{status.phase.value}: {rest}" if rest else status.phase.value


def lines(status: Status) -> tuple[str, ...]:
    """A state for a person, one line each."""
    rows = (
        ("process", f"{status.pid} on {status.host}, since {status.started}"),
        ("phase", summary(status)),
        ("model", f"{status.model} at {status.revision}" if status.revision else status.model),
        ("tuned", share_text(status.tuning) if status.phase is not Phase.TUNING else ""),
        ("download", share_text(status.download) if status.phase is not Phase.DOWNLOADING else ""),
        *(("file", name) for name in status.files),
        ("verdict", status.verdict),
        ("server", status.url),
    )
    return tuple(f"{name:<9}{text}" for name, text in rows if text)


def health(home: Path, seconds: float = HEALTH_SECONDS) -> tuple[bool, str]:
    """Whether the server here answers, and in one line what it does.

    The server is found among the running processes, wherever its state could be written. Of several servers (outside of
    a container) those of this data folder count, else all; the first that does not answer decides.
    """
    here = socket.gethostname()
    mine = {status.run: status for status in current_states(home) if status.host == here}
    servers = running_servers()
    servers = {run: url for run, url in servers.items() if run in mine} or servers
    if not servers:  # or another user's, whose environment cannot be read
        ready = [status for status in mine.values() if status.phase is Phase.SERVING and status.url]
        servers = {status.run: status.url for status in ready[:1] if may_serve(status.pid, status.run)}
    for run, url in servers.items():
        fault = _unhealthy(url, seconds)
        if fault:
            return False, f"{summary(mine[run])}; {fault}" if run in mine else fault
    if servers:
        return True, f"healthy: {', '.join(servers.values())}"
    others = sorted(mine.values(), key=lambda status: (status.phase is Phase.SERVING, status.phase in OVER))
    return False, summary(others[0]) if others else "no server of moefix runs here, and no moefix with this data folder"


def _unhealthy(url: str, seconds: float) -> str:
    """Why a server does not answer as it should, "" where it does. Its certificate is its own affair."""
    import http.client
    import ssl
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port
        connection = (
            http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl._create_unverified_context())  # noqa: S323
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=seconds)
        )
        try:
            connection.request("GET", "/health")
            code = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as fault:
        return f"{url} does not answer ({getattr(fault, 'strerror', None) or type(fault).__name__})"
    return "" if code == 200 else f"{url}/health answers {code}"
