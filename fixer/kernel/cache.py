"""What was compiled before: compile results, kept in one SQLite file in the data folder.

A candidate's shared memory depends on nothing but the kernel's source, the compiler and the candidate itself, so it
is worked out once. A plan that finds all of its candidates here starts no process and never imports Triton.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from enum import Enum
from functools import lru_cache
from importlib import resources
from pathlib import Path

from fixer.base.errors import CompileError
from fixer.base.files import Damaged, set_aside
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target, swaps_operands
from fixer.kernel.pool import CompilePool, Deadline, compile_all
from fixer.machine.processes import usable_cores

FILE_NAME = "compiled.sqlite"

_COLUMNS = ("key", "outcome", "shared_bytes", "seconds", "message")
_CREATE = (
    "CREATE TABLE IF NOT EXISTS compiled (key TEXT PRIMARY KEY, outcome TEXT NOT NULL, shared_bytes INTEGER NOT NULL, "
    "seconds REAL NOT NULL, message TEXT NOT NULL)"
)
_READ = "SELECT outcome, shared_bytes, seconds, message FROM compiled WHERE key = ?"
_WRITE = "INSERT OR REPLACE INTO compiled VALUES (?, ?, ?, ?, ?)"

_PATIENCE_SECONDS = 2.0
"""How long to wait for another process that writes."""

_DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What a damaged file raises; the second one is of SQLite's own complaint, which may quote it."""

_MOST_SHARED_BYTES = 1 << 24
_ARGUMENTS_CODE = (
    "kernel/compile.py",
    "kernel/source.py",
    "families/fused_moe/arguments.py",
    "sglang/cut.py",
    "sglang/stand_ins.py",
)
"""The files that work out what a kernel is compiled with; other code in one of them may make a kept result wrong."""

_TRITON_PACKAGES = ("triton", "pytorch-triton")


@lru_cache(maxsize=1)
def triton_version() -> str:
    """The version of the Triton that compiles here, without importing it.

    Raises:
        CompileError: there is none.
    """
    for package in _TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    raise CompileError("Triton is not installed.", "pip install triton (Linux only), or use --lookup-only.")


class CompileCache:
    """Compile results by what they depend on, for use in a `with` statement.

    Never a reason to fail: a damaged file is set aside and begun anew, and where the folder cannot be written, or
    another process holds the file for too long, nothing is kept.

    Args:
        folder: where the file is; None keeps nothing.

    Attributes:
        damaged: what was set aside, for the caller to report.
    """

    def __init__(self, folder: Path | None) -> None:
        self.damaged: tuple[Damaged, ...] = ()
        self._path = folder / FILE_NAME if folder is not None else None
        self._connection = self._open()

    def __enter__(self) -> CompileCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def keeps(self) -> bool:
        """Whether there is a file to keep results in."""
        return self._connection is not None

    def close(self) -> None:
        """Let go of the file; nothing is kept from here on."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def find(self, target: Target, candidates: Iterable[Candidate]) -> dict[Candidate, Compiled]:
        """The results that are kept, of those candidates."""
        found: dict[Candidate, Compiled] = {}
        for candidate in candidates:
            compiled = self._find(candidate_key(target, candidate))
            if compiled is not None:
                found[candidate] = compiled
        return found

    def keep(self, target: Target, results: Mapping[Candidate, Compiled]) -> None:
        """Keep those results that would be the same the next time."""
        rows = [
            (
                candidate_key(target, candidate),
                result.outcome.value,
                result.shared_bytes,
                result.seconds,
                result.message,
            )
            for candidate, result in results.items()
            if is_lasting(result)
        ]
        if self._connection is None or not rows:
            return
        try:
            with self._connection:
                self._connection.executemany(_WRITE, rows)
        except sqlite3.OperationalError:  # a full disk, a read-only folder, another process: then it is not kept
            pass
        except _DAMAGED as fault:
            self._begin_anew(str(fault))

    def _find(self, key: str) -> Compiled | None:
        if self._connection is None:
            return None
        try:
            row = self._connection.execute(_READ, (key,)).fetchone()
        except sqlite3.OperationalError:
            return None
        except _DAMAGED as fault:
            self._begin_anew(str(fault))
            return None
        return _compiled(row) if row else None

    def _open(self) -> sqlite3.Connection | None:
        if self._path is None:
            return None
        try:
            return _connect(self._path)
        except sqlite3.OperationalError:
            return None
        except _DAMAGED as fault:
            self._set_aside(str(fault))
        try:
            return _connect(self._path)
        except (sqlite3.Error, UnicodeDecodeError):
            return None

    def _begin_anew(self, reason: str) -> None:
        self.close()
        self._set_aside(reason)
        self._connection = self._open()

    def _set_aside(self, reason: str) -> None:
        assert self._path is not None
        # An old journal beside a new file would be replayed into it.
        journal = self._path.with_name(self._path.name + "-journal")
        paths = [path for path in (self._path, journal) if path.exists()]
        self.damaged += tuple(set_aside(path, reason) for path in paths)


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file or begin it.

    Raises:
        sqlite3.OperationalError: it cannot be read or written now.
        sqlite3.DatabaseError: it is damaged, or something else.
    """
    connection = sqlite3.connect(path, timeout=_PATIENCE_SECONDS)
    try:
        # What is lost in a power cut is compiled again; what matters is that plans do not wait for the disk.
        connection.execute("PRAGMA synchronous = OFF")
        if not _columns(connection):
            with connection:
                connection.execute(_CREATE)
        if _columns(connection) != _COLUMNS:
            raise sqlite3.DatabaseError("its table is not one of this moefix")
    except BaseException:
        connection.close()
        raise
    return connection


def _columns(connection: sqlite3.Connection) -> tuple[str, ...]:
    return tuple(str(row[1]) for row in connection.execute("PRAGMA table_info(compiled)"))


def _compiled(row: tuple[object, ...]) -> Compiled | None:
    """A row as a result; None for one that nobody wrote so (SQLite holds any type in any column)."""
    outcome, shared_bytes, seconds, message = row
    kinds = {outcome.value: outcome for outcome in _LASTING}
    if not (isinstance(outcome, str) and outcome in kinds and isinstance(seconds, float) and isinstance(message, str)):
        return None
    if not isinstance(shared_bytes, int) or not 0 <= shared_bytes <= _MOST_SHARED_BYTES:
        return None
    return Compiled(kinds[outcome], shared_bytes, seconds, message)


# --- what is kept, and under which key -------------------------------------------------------------------------------

_LASTING = (CompileOutcome.OK, CompileOutcome.FAILED)
_OF_THE_MACHINE = (OSError, MemoryError, ImportError, EOFError)


def is_lasting(compiled: Compiled) -> bool:
    """Whether compiling again would give the same: not after a deadline, a crash, a full disk or want of memory."""
    if compiled.outcome not in _LASTING:
        return False
    kind = getattr(builtins, compiled.message.partition(":")[0], None)
    return not (isinstance(kind, type) and issubclass(kind, _OF_THE_MACHINE))


def candidate_key(target: Target, candidate: Candidate) -> str:
    """All that a result depends on, as JSON: kernel source, Triton, architecture, launch arguments, candidate."""
    parts = {
        "kernel": target.source.sha256,
        "triton": triton_version(),
        "arch": target.arch,
        "arguments": _arguments_hash(),
        "workload": asdict(candidate.workload),
        "projection": candidate.projection,
        "tile": asdict(candidate.tile),
        "swaps": swaps_operands(target, candidate.workload, candidate.tile),
        "tokens": candidate.tokens,
    }
    return json.dumps(parts, default=_plain, sort_keys=True, separators=(",", ":"))


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


@lru_cache(maxsize=1)
def _arguments_hash() -> str:
    """Of the code that works out a launch's arguments: another moefix may compile with others."""
    package = resources.files("fixer")
    text = b"".join(package.joinpath(name).read_bytes() for name in _ARGUMENTS_CODE)
    return hashlib.sha256(text).hexdigest()[:16]


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_with_cache(
    target: Target,
    candidates: Iterable[Candidate],
    cache: CompileCache,
    triton_cache: Path,
    *,
    workers: int | None = None,
    deadline: Deadline | None = None,
    on_result: Callable[[Candidate, Compiled], None] | None = None,
) -> dict[Candidate, Compiled]:
    """Compile candidates, each once, and only those that the cache does not know.

    Args:
        target: kernel and architecture.
        cache: asked first; gets what is new as it comes, so that an interrupted run is not lost.
        triton_cache: Triton's own cache folder.
        workers: processes, None for one a core.
        deadline: seconds that one candidate may take.
        on_result: called with each result that had to be compiled.

    Returns:
        A result for every candidate, in their order.

    Raises:
        CompileError: Triton is not installed.
    """
    wanted = list(dict.fromkeys(candidates))
    results = cache.find(target, wanted) if wanted else {}
    missing = [candidate for candidate in wanted if candidate not in results]

    def take(candidate: Candidate, compiled: Compiled) -> None:
        cache.keep(target, {candidate: compiled})
        if on_result is not None:
            on_result(candidate, compiled)

    if missing:
        _require_triton()
        with CompilePool(target, triton_cache, min(workers or usable_cores(), len(missing)), deadline) as pool:
            results |= compile_all(pool, missing, take)
    return {candidate: results[candidate] for candidate in wanted}


def _require_triton() -> None:
    triton_version()
    if importlib.util.find_spec("triton") is None:
        raise CompileError("Triton is installed, but cannot be imported.", "Install it anew: pip install triton.")


def server_triton_cache() -> Path:
    """The folder in which Triton keeps compiled kernels for a server started with this environment."""
    chosen = os.environ.get("TRITON_CACHE_DIR")
    if chosen:
        return Path(chosen)
    # As Triton has it (knobs.py); Path.home() raises for a user without a name and HOME.
    return Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"
