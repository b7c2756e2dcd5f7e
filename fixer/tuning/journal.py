"""Every trial, written as it happens, so that a killed run goes on where it was and nothing is measured twice."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from fixer.artefacts.artefact import Environment
from fixer.base.errors import StoreError
from fixer.base.files import make_folder, set_aside, take_owner_of, utc_now
from fixer.families.family import Family
from fixer.families.registry import UNNAMED, family_of
from fixer.tuning.search.runner import Look, More, Request, Runner
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import AnyWorkload, Kernel, Projection, Tile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, environment TEXT NOT NULL, workload TEXT NOT NULL,
    began TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS builds (run TEXT NOT NULL, projection TEXT NOT NULL, tile TEXT NOT NULL,
    outcome TEXT NOT NULL, shared_bytes INTEGER NOT NULL, registers INTEGER NOT NULL, spills INTEGER NOT NULL,
    compile_seconds REAL NOT NULL, message TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (run, projection, tile)) STRICT;
CREATE TABLE IF NOT EXISTS timings (run TEXT NOT NULL, projection TEXT NOT NULL, tile TEXT NOT NULL,
    tokens INTEGER NOT NULL, microseconds REAL NOT NULL, least REAL NOT NULL, replays INTEGER NOT NULL,
    at TEXT NOT NULL, PRIMARY KEY (run, projection, tile, tokens, replays)) STRICT;
"""
_COLUMNS = {
    "runs": "run environment workload began",
    "builds": "run projection tile outcome shared_bytes registers spills compile_seconds message at",
    "timings": "run projection tile tokens microseconds least replays at",
}
"""What the tables above have, to tell a file of another form."""


@dataclass(frozen=True)
class RunKey:
    """What a trial's validity depends on; trials of another key are never seen."""

    environment: Environment
    workload: AnyWorkload

    @property
    def family(self) -> Family:
        """The kernel family."""
        return family_of(self.workload)

    @property
    def digest(self) -> str:
        """A name for the key in the journal."""
        # The first family is left out: what earlier versions wrote, which had one only, is still found.
        named = () if self.family is UNNAMED else (self.family.name,)
        parts = repr((self.environment.counting_parts(), sorted(asdict(self.workload).items(), key=str), *named))
        return sha256(parts.encode()).hexdigest()[:24]


class Journal:
    """The trials of one run key in the data folder's journal.

    A damaged journal is set aside and a new one begun; `notes` says so.

    Raises:
        StoreError: the folder cannot be written.
    """

    def __init__(self, path: Path, key: RunKey) -> None:
        self._path = path
        self._key = key
        self._run = key.digest
        self.notes: tuple[str, ...] = ()
        make_folder(path.parent)
        try:
            self._database = self._open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: of SQLite's own complaint
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise self._unusable(error) from error
            self.notes = (str(set_aside(path, f"the journal is damaged: {error}")),)
            # What SQLite keeps for undoing a write belongs to the damaged file, and would spoil the new one.
            undo = path.with_name(path.name + "-journal")
            if undo.exists():
                set_aside(undo, "it belongs to a damaged journal")
            try:
                self._database = self._open()
            except (sqlite3.Error, UnicodeDecodeError) as again:
                raise self._unusable(again) from again
        with suppress(OSError):
            take_owner_of(path.parent, path)

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=30)
        try:
            # The quick check leaves out indexes, and a row that its index does not know is not found again.
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("malformed: its own check fails")
            # Waiting for the disk at every trial would cost seconds. What was written outlives this process's death;
            # a power cut may damage the file, which is then set aside and measured anew.
            database.execute("PRAGMA synchronous = OFF")
            database.executescript(_SCHEMA)
            self._check_columns(database)
            self._check_rows(database)
            with database:
                database.execute(
                    "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?)",
                    (
                        self._run,
                        repr(self._key.environment),
                        f"{self._key.family.name}: {self._key.workload!r}",
                        utc_now(),
                    ),
                )
        except BaseException:
            database.close()
            raise
        return database

    @staticmethod
    def _check_columns(database: sqlite3.Connection) -> None:
        """A database of another form is as useless as a damaged one."""
        for table, columns in _COLUMNS.items():
            found = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            if found != columns.split():
                raise sqlite3.DatabaseError(f"malformed: the columns of {table} are not known")

    def _check_rows(self, database: sqlite3.Connection) -> None:
        """Values that moefix never writes make the whole file as good as damaged: who knows what else is wrong."""
        builds = database.execute(
            "SELECT projection, tile, outcome, shared_bytes, registers, spills, compile_seconds FROM builds"
            " WHERE run = ?",
            (self._run,),
        )
        timings = database.execute(
            "SELECT projection, tile, tokens, replays, microseconds, least FROM timings WHERE run = ?", (self._run,)
        )
        try:
            for projection, tile, outcome, *numbers in builds:
                self._check_kernel(_kernel(projection, tile))
                Outcome(outcome)
                _check(all(0 <= number <= _LARGEST for number in numbers))
            for projection, tile, tokens, replays, *times in timings:
                self._check_kernel(_kernel(projection, tile))
                _check(0 < tokens <= _LARGEST and 0 < replays <= _LARGEST and all(0 < t <= _LARGEST for t in times))
        except (ValueError, TypeError, sqlite3.OperationalError) as error:
            raise sqlite3.DatabaseError(f"malformed: a row of it makes no sense ({error})") from error

    def _check_kernel(self, kernel: Kernel) -> None:
        """Refuse what is no kernel of the key's family."""
        if kernel.projection not in self._key.family.products:
            raise ValueError(f"{self._key.family.name} has no product {kernel.projection.value}")
        self._key.family.check_tile(kernel.tile)

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            f"The journal {self._path} cannot be used: {error}.", "Check the data folder's space and owner."
        )

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def forget(self) -> None:
        """Drop this key's trials (`--fresh`)."""
        try:
            with self._database as database:
                for table in ("builds", "timings"):
                    database.execute(f"DELETE FROM {table} WHERE run = ?", (self._run,))  # noqa: S608 (a constant)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def write(self, look: Look) -> None:
        """Keep a look, build and timings together."""
        build = look.build
        try:
            with self._database as database:
                database.execute(
                    "INSERT OR REPLACE INTO builds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        self._run,
                        *_kernel_key(build.kernel),
                        build.outcome.value,
                        build.shared_bytes,
                        build.registers,
                        build.spills,
                        build.compile_seconds,
                        build.message,
                        utc_now(),
                    ),
                )
                if build.outcome is not Outcome.OK:
                    database.execute(
                        "DELETE FROM timings WHERE run = ? AND projection = ? AND tile = ?",
                        (self._run, *_kernel_key(build.kernel)),
                    )
                self._insert(database, look.timings)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def write_timing(self, timing: Timing) -> None:
        """Keep a closer look's time."""
        try:
            with self._database as database:
                self._insert(database, [timing])
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _insert(self, database: sqlite3.Connection, timings: Iterable[Timing]) -> None:
        database.executemany(
            "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (self._run, *_kernel_key(t.kernel), t.tokens, t.microseconds, t.least, t.replays, utc_now())
                for t in timings
            ],
        )

    def looks(self) -> dict[Kernel, Look]:
        """Every kernel's build with its timings of the first look (the fewest replays of each row), as tried."""
        return _looks(self._database, self._run)

    def timings(self) -> list[Timing]:
        """Every time, in the order of the rows and replays."""
        return _timings(self._database, self._run)


def read_looks(path: Path, key: RunKey) -> tuple[Look, ...]:
    """The looks of a run in the order in which they were made, from a journal that is only read.

    Empty where there is no journal, nothing of that run in it, or it cannot be read now.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as database:
            return tuple(_looks(database, key.digest).values())
    except (sqlite3.Error, ValueError):
        return ()


def _looks(database: sqlite3.Connection, run: str) -> dict[Kernel, Look]:
    timings: dict[Kernel, dict[int, Timing]] = {}
    for timing in _timings(database, run):
        rows = timings.setdefault(timing.kernel, {})
        if timing.tokens not in rows or timing.replays < rows[timing.tokens].replays:
            rows[timing.tokens] = timing
    with closing(
        database.execute(
            "SELECT projection, tile, outcome, shared_bytes, registers, spills, compile_seconds, message"
            " FROM builds WHERE run = ? ORDER BY rowid",
            (run,),
        )
    ) as rows_of_builds:
        builds = [
            Build(_kernel(projection, tile), Outcome(outcome), shared, registers, spills, seconds, message)
            for projection, tile, outcome, shared, registers, spills, seconds, message in rows_of_builds
        ]
    return {b.kernel: Look(b, tuple(timings.get(b.kernel, {}).values())) for b in builds}


def _timings(database: sqlite3.Connection, run: str) -> list[Timing]:
    with closing(
        database.execute(
            "SELECT projection, tile, tokens, microseconds, least, replays FROM timings WHERE run = ?"
            " ORDER BY tokens, replays",
            (run,),
        )
    ) as rows:
        return [
            Timing(_kernel(projection, tile), tokens, microseconds, least, replays)
            for projection, tile, tokens, microseconds, least, replays in rows
        ]


_LARGEST = 1e9
"""No count, size or time in a journal comes near it, and NaN compares with nothing."""


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("a number is absurd")


def _kernel_key(kernel: Kernel) -> tuple[str, str]:
    tile = kernel.tile
    values = (tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages)
    return kernel.projection.value, " ".join(map(str, values)) + (" tma" if tile.use_tma else "")


def _kernel(projection: str, tile: str) -> Kernel:
    plain = tile.removesuffix(" tma")
    block_m, block_n, block_k, group_m, num_warps, num_stages = map(int, plain.split())
    values = (block_m, block_n, block_k, group_m, num_warps, num_stages)
    return Kernel(Projection(projection), Tile(*values, use_tma=plain != tile))


class JournaledRunner:
    """A runner that answers from the journal what it can, and writes down what it measures."""

    def __init__(self, inner: Runner, journal: Journal) -> None:
        self._inner = inner
        self._journal = journal
        self._looks = journal.looks()
        self._timings = {(t.kernel, t.tokens, t.replays): t for t in journal.timings()}
        self.resumed = len(self._looks)

    def look(self, requests: Sequence[Request], more: More | None = None) -> Iterator[Look]:
        """What is known first, at once; then the rest."""
        known_looks, fresh = self._split(requests)
        yield from known_looks
        waiting: deque[Look] = deque()

        def fresh_more() -> Sequence[Request]:
            known_later, fresh_later = self._split(more() if more is not None else ())
            waiting.extend(known_later)
            return fresh_later

        for look in self._inner.look(fresh, fresh_more if more is not None else None):
            self._journal.write(look)
            yield self._with_known(look)
            while waiting:
                yield waiting.popleft()
        yield from waiting

    def _split(self, requests: Sequence[Request]) -> tuple[list[Look], list[Request]]:
        """What the journal answers, and what is still to be measured."""
        looks, fresh = [], []
        for request in requests:
            known = self._looks.get(request.kernel)
            missing = self._missing_rows(request, known)
            if known is not None and not missing:
                looks.append(known)
            else:
                fresh.append(Request(request.kernel, missing))
        return looks, fresh

    def _with_known(self, look: Look) -> Look:
        """A fresh look together with the rows that were known; one that failed now is not chosen for older times."""
        known = self._looks.get(look.build.kernel)
        if known is None or look.build.outcome is not Outcome.OK:
            return look
        return Look(look.build, (*known.timings, *look.timings))

    @staticmethod
    def _missing_rows(request: Request, known: Look | None) -> tuple[int, ...]:
        if known is None:
            return request.rows
        if known.build.outcome is not Outcome.OK:
            return ()
        timed = {timing.tokens for timing in known.timings}
        return tuple(tokens for tokens in request.rows if tokens not in timed)

    def closer(self, wanted: Iterable[tuple[Kernel, int]], replays: int) -> Iterator[Timing]:
        """What is known first; then the rest."""
        fresh = []
        for kernel, tokens in wanted:
            known = self._timings.get((kernel, tokens, replays))
            if known is not None:
                yield known
            else:
                fresh.append((kernel, tokens))
        for timing in self._inner.closer(fresh, replays):
            self._journal.write_timing(timing)
            yield timing
