"""The data folder: what moefix keeps from one start to the next, and how it is written so that no fault harms it.

Everything is written to a temporary file beside its place and moved there in one step, so that a reader finds the old
content or the new, never half. What is found damaged is moved aside under a name that says so: it is reported, not
used, not deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import socket
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fixer.base.errors import StoreError
from fixer.workload import NumberFormat, Tile, Workload

# --- where -----------------------------------------------------------------------------------------------------------

_HOME_HINT = "Set MOEFIX_HOME (or --moefix-home) to a folder that this user can write."


def data_home(chosen: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The data folder, made if need be and proven writable.

    `chosen` (--moefix-home) comes first, then MOEFIX_HOME, then /data in moefix's image (MOEFIX_IMAGE=1), then
    $XDG_DATA_HOME/moefix, by default ~/.local/share/moefix.

    Raises:
        StoreError: the folder cannot be made or written.
    """
    home = wanted_home(chosen, environ)
    make_folder(home)
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as fault:
        raise _store_error(f"the data folder {home} cannot be written", fault) from fault
    return home


def wanted_home(chosen: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the data folder is to be; nothing is made.

    Raises:
        StoreError: this user has no home folder, and none is named.
    """
    try:
        if chosen or environ.get("MOEFIX_HOME"):
            return Path(chosen or environ["MOEFIX_HOME"]).expanduser().absolute()
        if environ.get("MOEFIX_IMAGE") == "1":
            return Path("/data")
        shared = environ.get("XDG_DATA_HOME", "")
        # The XDG specification has a relative path ignored.
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".local" / "share"
        return base / "moefix"
    except RuntimeError as fault:
        raise StoreError(f"there is no home folder for this user ({fault})", _HOME_HINT) from fault


def _store_error(what: str, fault: OSError | ValueError) -> StoreError:
    code = fault.errno if isinstance(fault, OSError) else None
    reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(f"{what}: {reason}", "Free some space there, or: " + _HOME_HINT if full else _HOME_HINT)


# --- writing ---------------------------------------------------------------------------------------------------------

FILE_MODE, FOLDER_MODE = 0o644, 0o755
_LEFTOVER_SECONDS = 3600


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, mode 0755, owned as the nearest existing parent is (where root makes them).

    Raises:
        StoreError: it cannot be made, or something that is no folder is in the way.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            _make_one_folder(path)
    except (OSError, ValueError) as fault:
        raise _store_error(f"the folder {folder} cannot be made", fault) from fault


def _make_one_folder(path: Path) -> None:
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return  # another process was quicker
    with contextlib.suppress(OSError):  # not every mounted file system has modes
        path.chmod(FOLDER_MODE)
    take_owner_of(path.parent, path)


def take_owner_of(folder: Path, target: Path | int) -> None:
    """Give `target` (a path, itself if it is a link, or an open file) the owner of `folder`, if this process is root.

    So a user's mounted volume does not fill with root's files.
    """
    if os.geteuid() != 0:
        return
    # Without CAP_CHOWN, or on a file server that maps root to nobody, root's own name has to do.
    with contextlib.suppress(OSError):
        owner = folder.stat()
        if isinstance(target, int):
            os.fchown(target, owner.st_uid, owner.st_gid)
        else:
            os.lchown(target, owner.st_uid, owner.st_gid)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all: whatever dies when, a reader sees the old bytes or the new.

    The file gets mode 0644 and, where root writes into another user's folder, that user as its owner. The folder is
    made if need be.

    Raises:
        StoreError: it cannot be written; what was at `path` is untouched.
    """
    write_together(((path, content),))


def write_together(files: Sequence[tuple[Path, bytes]]) -> None:
    """Put each content at its path, after all of them are safe on the disk: a full disk changes none of the files.

    Each file changes in one step; a crash between two steps leaves some new and some old.

    Raises:
        StoreError: one cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files:
            make_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder is in the way", str(path))
            staged.append((_stage(path, content), path))
        for temporary, path in staged:
            os.replace(temporary, path)
        for folder in {path.parent for path, _ in files}:
            _sync_folder(folder)
    except (OSError, ValueError) as fault:
        raise _store_error(f"{' and '.join(str(path) for path, _ in files)} cannot be written", fault) from fault
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    """A finished temporary file beside `path`. The random name keeps two containers, both process 1, apart."""
    prefix = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"
    handle, name = tempfile.mkstemp(".tmp", prefix, path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # not every mounted file system has modes
                os.fchmod(handle, FILE_MODE)
            take_owner_of(path.parent, handle)
            file.write(content)
            file.flush()
            os.fsync(handle)
            now = os.fstat(handle).st_mtime
        _remove_leftovers(path.parent, prefix, now)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _remove_leftovers(folder: Path, prefix: str, now: float) -> None:
    """Remove what a killed writer of the same file left. Both times are the file system's, so clocks do not matter."""
    for leftover in folder.glob(f"{prefix}*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to sync a folder; the rename is done all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading what may be damaged -------------------------------------------------------------------------------------

MOST_BYTES = 1 << 20
"""No file of moefix or SGLang's tuning comes near 1 MiB (SGLang's longest has 15 KiB)."""


@dataclass(frozen=True)
class Damaged:
    """A file that could not be used.

    Attributes:
        path: where it was.
        kept_as: where it is now; None if it could not be moved and is still at `path`.
        reason: what is wrong with it, in one line.
    """

    path: Path
    kept_as: Path | None
    reason: str

    def __str__(self) -> str:
        fate = f"kept as {self.kept_as.name}" if self.kept_as else "it could not be moved aside"
        return f"{self.path} is not used: {self.reason} ({fate})"


def read_bounded(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most_bytes`; a pipe or a device under that name does not block.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or longer.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    return content


def parse_json(content: str | bytes) -> Any:
    """A JSON text as Python objects, strictly: no NaN, no name twice in one object, no nesting without end.

    Raises:
        ValueError: it is not such a text.
    """
    try:
        parsed = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_no_name_twice)
        _check_depth(parsed)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return parsed


def parse_object(content: str | bytes, schema: int) -> dict[str, Any]:
    """A JSON object whose "schema" is that number, by `parse_json`.

    Raises:
        ValueError: it is no such object.
    """
    body = parse_json(content)
    if not isinstance(body, dict):
        raise ValueError("it is not an object")
    if body.get("schema") != schema or isinstance(body["schema"], bool):
        raise ValueError(f"its schema is not {schema}")
    return body


def _check_depth(value: Any, most: int = 20) -> None:
    if most == 0:
        raise RecursionError
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        if isinstance(item, (dict, list)):
            _check_depth(item, most - 1)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return row


def set_aside(path: Path, reason: str, label: str = "damaged") -> Damaged:
    """Move a damaged file to `<name>.damaged-<UTC>` beside it, over no other file. Never raises, never deletes."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    shown = reason if len(reason) <= 200 else reason[:197] + "..."
    for attempt in range(100):
        target = path.with_name(f"{path.name}.{label}-{stamp}" + (f"-{attempt}" if attempt else ""))
        if os.path.lexists(target):
            continue
        try:
            path.rename(target)
        except OSError:
            break
        return Damaged(path, target, shown)
    return Damaged(path, None, shown)


# --- what is kept ----------------------------------------------------------------------------------------------------

TILE_LIMITS = {"block_m": 512, "block_n": 512, "block_k": 1024, "group_m": 4096, "num_warps": 32, "num_stages": 12}
"""The largest value that makes sense in each part of a tile. SGLang's 827 shipped NVIDIA files stay at or below
256, 256, 256, 128, 16 and 8; the kernel's dot product needs blocks of 16 at least; a thread block has 32 warps."""


def check_tile(tile: Tile) -> Tile:
    """The tile itself, if it makes sense for the kernel.

    Raises:
        ValueError: a part of it is absurd, such as a block of 4096, of 1 or of 48.
    """
    Tile.from_json(tile.to_json())
    for name, most in TILE_LIMITS.items():
        least = 16 if name.startswith("block") else 1
        value = getattr(tile, name)
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}, outside {least} to {most}")
    return tile


@dataclass(frozen=True)
class Environment:
    """Everything but the model that a measurement depends on.

    Attributes:
        card: as the CUDA driver writes it.
        capability: compute capability.
        shared_memory: opt-in shared memory per block, in bytes.
        driver: the driver's version; only its major part counts.
        triton, sglang: their versions.
        kernel_hash: hash of the kernel's source, in hex.
        moefix: moefix's version, for the record: a difference does not make a measurement void.
    """

    card: str
    capability: tuple[int, int]
    shared_memory: int
    driver: str
    triton: str
    sglang: str
    kernel_hash: str
    moefix: str

    @property
    def driver_major(self) -> str:
        """ "580" of "580.159.03"."""
        return self.driver.split(".", 1)[0]

    def counting_parts(self) -> tuple[tuple[str, str], ...]:
        """(name, value) of each part that makes a measurement void when it changes."""
        return (
            ("card", self.card),
            ("compute capability", f"{self.capability[0]}.{self.capability[1]}"),
            ("shared memory limit", str(self.shared_memory)),
            ("driver", self.driver_major),
            ("Triton", self.triton),
            ("SGLang", self.sglang),
            ("kernel source", self.kernel_hash),
        )

    def difference(self, other: Environment) -> tuple[str, ...]:
        """Names of the counting parts in which the two differ; empty where a measurement of one holds for the other."""
        pairs = zip(self.counting_parts(), other.counting_parts(), strict=True)
        return tuple(name for (name, mine), (_, theirs) in pairs if mine != theirs)

    def explain(self, now: Environment) -> tuple[str, ...]:
        """One phrase for each part that differs: "Triton was 3.5.1, is 3.6.0"."""
        pairs = zip(self.counting_parts(), now.counting_parts(), strict=True)
        return tuple(
            f"{name} was {_short(was) or 'unknown'}, is {_short(now_is) or 'unknown'}"
            for (name, was), (_, now_is) in pairs
            if was != now_is
        )


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{32,}", value) else value


class Decision(Enum):
    """Why a row has the tiles that it has."""

    TUNED = "tuned"
    """Measured, and faster than SGLang's own."""
    KEPT_SGLANG = "kept_sglang"
    """Measured, and SGLang's own is as good or better."""
    FITTING_ONLY = "fitting_only"
    """Known to fit the card's shared memory; not measured against SGLang's own, which may not fit."""


@dataclass(frozen=True)
class RowChoice:
    """The tiles for one batch size, and what they rest on. Times are medians in microseconds, None if not measured.

    Attributes:
        batch: M, in tokens.
        gate_up, down: the tiles; they share block_m.
        gate_up_us, down_us: the chosen tiles' times.
        sglang_gate_up_us, sglang_down_us: the times of what SGLang would have used.
        noise: run-to-run spread of a time, as a fraction of it.
        layer_us, sglang_layer_us: the whole layer's time through SGLang's own path, with these tiles and with SGLang's
            own.
        decision: why these tiles.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    batch: int
    gate_up: Tile
    down: Tile
    decision: Decision
    gate_up_us: float | None = None
    down_us: float | None = None
    sglang_gate_up_us: float | None = None
    sglang_down_us: float | None = None
    noise: float | None = None
    layer_us: float | None = None
    sglang_layer_us: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 1 << 24:
            raise ValueError(f"M is {self.batch}, outside 1 to 16777216")
        if check_tile(self.gate_up).block_m != check_tile(self.down).block_m:
            raise ValueError(f"row {self.batch}: gate_up and down differ in BLOCK_SIZE_M")
        if self.gate_up.use_tma:
            raise ValueError(f"row {self.batch}: USE_TMA is for the down projection only")
        for value in (*self.times, *self.layer_times):
            if value is not None and not (math.isfinite(value) and 0 < value <= 1e9):
                raise ValueError(f"row {self.batch}: {value} is no time in microseconds")
        if self.noise is not None and not 0 <= self.noise <= 1000:
            raise ValueError(f"row {self.batch}: {self.noise} is no noise fraction")
        if self.decision is not Decision.FITTING_ONLY and None in self.times and None in self.layer_times:
            raise ValueError(f"row {self.batch}: {self.decision.value} without all four times")

    @property
    def times(self) -> tuple[float | None, ...]:
        """The four medians of single kernels."""
        return (self.gate_up_us, self.down_us, self.sglang_gate_up_us, self.sglang_down_us)

    @property
    def layer_times(self) -> tuple[float | None, ...]:
        """The two medians of the whole layer."""
        return (self.layer_us, self.sglang_layer_us)


SCHEMA = 1


@dataclass(frozen=True)
class Artefact:
    """One finished tuning: for which card, software, model and workload, and what came out.

    Attributes:
        environment: what the times were measured under.
        model: name, as the user gave it.
        revision: the hub's commit, "" where there is none.
        workload: the layer that was tuned.
        gate_up_file, down_file: SGLang's names for the two files.
        rows: by ascending batch size.
        created: UTC, "2026-11-23T22:58:01Z".
        seconds: what tuning took.
        measured: False where the tiles are only known to fit.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    environment: Environment
    model: str
    revision: str
    workload: Workload
    gate_up_file: str
    down_file: str
    rows: tuple[RowChoice, ...]
    created: str
    seconds: float
    measured: bool

    def __post_init__(self) -> None:
        for name in (self.gate_up_file, self.down_file):
            check_file_name(name)
        if self.gate_up_file == self.down_file:
            raise ValueError("gate_up and down have one file name")
        batches = [row.batch for row in self.rows]
        if not 1 <= len(batches) <= 1024 or any(low >= high for low, high in itertools.pairwise(batches)):
            raise ValueError("the rows are not 1 to 1024 ascending batch sizes")
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= 1e8):
            raise ValueError(f"{self.seconds} seconds is no duration")
        if not self.measured and any(row.decision is not Decision.FITTING_ONLY for row in self.rows):
            raise ValueError("nothing was measured, and yet a row says that it was")
        datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)

    def to_json(self) -> str:
        """The artefact as a JSON text with a checksum, so that a flipped bit is seen."""
        body = json.loads(json.dumps(asdict(self), default=_plain))
        for row, choice in zip(body["rows"], self.rows, strict=True):
            row["gate_up"], row["down"] = choice.gate_up.to_json(), choice.down.to_json()
        body["schema"] = SCHEMA
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes) -> Artefact:
        """The artefact in a JSON text that may be damaged or hostile.

        Raises:
            ValueError: anything at all is not as `to_json` writes it; the text says what.
        """
        body = parse_object(content, SCHEMA)
        if body.pop("checksum", None) != _checksum(body):
            raise ValueError("its checksum does not match its content")
        return _read_artefact(Reader(body, "artefact"))


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _checksum(body: Mapping[str, Any]) -> str:
    # No deeper than parse_json lets through, so that the encoder's own recursion limit is never met.
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_file_name(name: str) -> str:
    """The name itself, if it is a plain .json file's: no folder in it, not hidden, printable, of bearable length.

    Raises:
        ValueError: it is not.
    """
    plain = name.isprintable() and "/" not in name and "\\" not in name and not name.startswith(".")
    if not (plain and name.endswith(".json") and len(os.fsencode(name)) <= 200):
        raise ValueError(f"{name[:80]!r} is no name for a tuning file")
    return name


_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)


class Reader:
    """Takes typed values out of one JSON object; every doubt is a ValueError that names the place."""

    def __init__(self, row: Any, place: str) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not an object")
        self._row: dict[str, Any] = row
        self._place = place

    def value(self, name: str) -> Any:
        """What is there under a name."""
        if name not in self._row:
            raise ValueError(f"{self._place} has no {name}")
        return self._row[name]

    def _wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self._place}: {name} is not {wanted}")

    def text(self, name: str, most: int = 1000) -> str:
        """A printable text of at most so many characters."""
        value = self.value(name)
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise self._wrong(name, "a printable text of bearable length")
        return value

    def whole(self, name: str, least: int = 0, most: int = 1 << 31) -> int:
        """A whole number between these bounds, both included."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.value(name)
        # A huge int compares with a float exactly, and so never overflows here.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
            raise self._wrong(name, "a number of bearable size")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or null."""
        return None if self.value(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Two whole numbers."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) != 2:
            raise self._wrong(name, "a pair")
        inner = Reader({str(place): item for place, item in enumerate(value)}, f"{self._place}: {name}")
        return inner.whole("0", most=1 << 20), inner.whole("1", most=1 << 20)

    def one_of(self, name: str, kind: type[_E]) -> _E:
        """A member of an enum, by its value."""
        value = self.value(name)
        if not isinstance(value, str) or value not in {member.value for member in kind}:
            raise self._wrong(name, f"a {kind.__name__}")
        return kind(value)

    def inner(self, name: str) -> Reader:
        """An object within this one."""
        return Reader(self.value(name), f"{self._place}: {name}")

    def each(self, name: str) -> Iterator[Reader]:
        """The objects of a list."""
        rows = self.value(name)
        if not isinstance(rows, list):
            raise self._wrong(name, "a list")
        return (Reader(row, f"{self._place}: {name}[{place}]") for place, row in enumerate(rows))

    def tile(self, name: str) -> Tile:
        """A tile."""
        row = self.value(name)
        if not isinstance(row, dict):
            raise self._wrong(name, "an object")
        return Tile.from_json(row)

    def only(self, names: set[str]) -> None:
        """Refuse a name that nobody writes: it would be lost in silence."""
        strange = sorted(set(self._row) - names)
        if strange:
            raise ValueError(f"{self._place} has an unknown part {strange[0][:40]!r}")


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _read_artefact(reader: Reader) -> Artefact:
    reader.only(_names(Artefact) | {"schema"})
    return Artefact(
        environment=_read_environment(reader.inner("environment")),
        model=reader.text("model", 4096),
        revision=reader.text("revision"),
        workload=_read_workload(reader.inner("workload")),
        gate_up_file=reader.text("gate_up_file"),
        down_file=reader.text("down_file"),
        rows=tuple(_read_row(row) for row in reader.each("rows")),
        created=reader.text("created"),
        seconds=reader.number("seconds"),
        measured=reader.flag("measured"),
    )


def _read_environment(reader: Reader) -> Environment:
    reader.only(_names(Environment))
    return Environment(
        card=reader.text("card"),
        capability=reader.pair("capability"),
        shared_memory=reader.whole("shared_memory"),
        driver=reader.text("driver"),
        triton=reader.text("triton"),
        sglang=reader.text("sglang"),
        kernel_hash=reader.text("kernel_hash"),
        moefix=reader.text("moefix"),
    )


def _read_workload(reader: Reader) -> Workload:
    reader.only(_names(Workload))
    return Workload(
        experts=reader.whole("experts", 1, 1 << 16),
        intermediate=reader.whole("intermediate", 1, 1 << 20),
        hidden_size=reader.whole("hidden_size", 1, 1 << 20),
        top_k=reader.whole("top_k", 1, 1 << 12),
        number_format=reader.one_of("number_format", NumberFormat),
        activation_dtype=reader.text("activation_dtype", 40),
        block_shape=None if reader.value("block_shape") is None else reader.pair("block_shape"),
        per_channel_quant=reader.flag("per_channel_quant"),
        group_size=reader.whole("group_size", 0, 1 << 20),
        has_zero_points=reader.flag("has_zero_points"),
        gated=reader.flag("gated"),
        tp_size=reader.whole("tp_size", 1, 1 << 16),
        ep_size=reader.whole("ep_size", 1, 1 << 16),
    )


def _read_row(reader: Reader) -> RowChoice:
    reader.only(_names(RowChoice))
    return RowChoice(
        batch=reader.whole("batch", 1),
        gate_up=reader.tile("gate_up"),
        down=reader.tile("down"),
        decision=reader.one_of("decision", Decision),
        gate_up_us=reader.optional_number("gate_up_us"),
        down_us=reader.optional_number("down_us"),
        sglang_gate_up_us=reader.optional_number("sglang_gate_up_us"),
        sglang_down_us=reader.optional_number("sglang_down_us"),
        noise=reader.optional_number("noise"),
        layer_us=reader.optional_number("layer_us"),
        sglang_layer_us=reader.optional_number("sglang_layer_us"),
    )


def utc_now() -> str:
    """The time as an artefact writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- artefacts in the data folder ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """An artefact for the same workload that does not hold here.

    Attributes:
        path: the artefact.
        parts: which parts differ: "Triton", "driver".
        reasons: the same as phrases: "Triton was 3.5.1, is 3.6.0".
    """

    path: Path
    parts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The answer of `find_artefact`.

    Attributes:
        artefact: the one that holds here, or None.
        mismatch: where there is none, the nearest one of the same workload, if any.
        damaged: files that could not be used, for the caller to report.
        path: where the artefact is.
    """

    artefact: Artefact | None
    mismatch: Mismatch | None
    damaged: tuple[Damaged, ...]
    path: Path | None = field(default=None, compare=False)


def safe_name(text: str) -> str:
    """`text` as one component of a path: letters, digits and `._=,+-` only, not hidden, at most 100 characters."""
    return re.sub(r"[^A-Za-z0-9._=,+-]", "_", text).lstrip(".")[:100] or "unnamed"


def artefact_path(home: Path, environment: Environment, workload: Workload) -> Path:
    """Where the artefact for that environment and workload is: artefacts/<card>/<shape>-<hash of all that counts>."""
    key = json.dumps([environment.counting_parts(), asdict(workload)], default=_plain, sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    shape = f"E={workload.experts},N={workload.intermediate},{workload.number_format.value}"
    return home / "artefacts" / safe_name(environment.card.replace(" ", "_")) / f"{shape}-{digest}.json"


def save_artefact(home: Path, artefact: Artefact) -> Path:
    """Keep an artefact, in place of an older one for the same environment and workload.

    Returns:
        Where it is.

    Raises:
        StoreError: it cannot be written; an older one is untouched.
    """
    path = artefact_path(home, artefact.environment, artefact.workload)
    write_atomically(path, artefact.to_json().encode())
    return path


def find_artefact(home: Path, environment: Environment, workload: Workload, *, without: Container[Path] = ()) -> Found:
    """The kept artefact for this environment and workload, whatever state the folder is in. Never raises for a file.

    A damaged file is moved aside and reported. One that was not measured holds for any driver: nothing ran on one.

    Args:
        without: files to pass over.
    """
    path = artefact_path(home, environment, workload)
    artefact, damaged = _load(path) if path not in without else (None, None)
    reports = [damaged] if damaged else []
    if artefact and artefact.workload == workload and not artefact.environment.difference(environment):
        return Found(artefact, None, (), path)
    near: list[Mismatch] = []
    for other_path in _artefact_files(home):
        if other_path in without:
            continue
        other, damaged = _load(other_path)
        if damaged:
            reports.append(damaged)
        if other and other.workload == workload:
            was = other.environment if other.measured else replace(other.environment, driver=environment.driver)
            parts = was.difference(environment)
            near.append(Mismatch(other_path, parts, was.explain(environment)))
            if not parts:
                return Found(other, None, tuple(dict.fromkeys(reports)), other_path)
    return Found(None, min(near, key=lambda mismatch: len(mismatch.parts), default=None), tuple(dict.fromkeys(reports)))


def earlier_tiles(home: Path, workload: Workload, most: int = 24) -> tuple[Tile, ...]:
    """What earlier tunings on this volume chose for the same number format, the most frequent first.

    Whatever they were measured with: as something to try, a winner of another card, shape or Triton is good enough.
    """
    wins: Counter[Tile] = Counter()
    for path in _artefact_files(home):
        artefact, _ = _load(path)
        if artefact is None or not artefact.measured:
            continue
        other = artefact.workload
        if other.number_format is workload.number_format and bool(other.block_shape) == bool(workload.block_shape):
            wins.update(tile for row in artefact.rows for tile in (row.gate_up, row.down) if not tile.use_tma)
    return tuple(tile for tile, _ in wins.most_common(most))


def kept_artefacts(home: Path) -> tuple[tuple[tuple[Path, Artefact], ...], tuple[Damaged, ...]]:
    """Every artefact in the data folder that can be read, the newest first; and what was damaged, moved aside."""
    loaded = [(path, *_load(path)) for path in _artefact_files(home)]
    usable = [(path, artefact) for path, artefact, _ in loaded if artefact is not None]
    usable.sort(key=lambda entry: entry[1].created, reverse=True)
    return tuple(usable), tuple(damaged for _, _, damaged in loaded if damaged)


def _artefact_files(home: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted((home / "artefacts").glob("*/*.json")))
    except OSError:
        return ()


def _load(path: Path) -> tuple[Artefact | None, Damaged | None]:
    return read_or_set_aside(path, Artefact.from_json)


def read_or_set_aside(path: Path, parse: Callable[[bytes], _T]) -> tuple[_T | None, Damaged | None]:
    """What `parse` makes of a file; where it raises ValueError the file is moved aside. Neither for one not there."""
    try:
        return parse(read_bounded(path)), None
    except FileNotFoundError:
        return None, None
    except OSError as fault:
        # It may be readable tomorrow, or by another user: left where it is.
        return None, Damaged(path, None, fault.strerror or "it cannot be read")
    except ValueError as fault:
        return None, set_aside(path, str(fault))


# --- one at a time ---------------------------------------------------------------------------------------------------

_held: set[int] = set()


def _close_in_child() -> None:
    """A child forked while a lock is held must not hold it too: the lock would outlive a parent that is killed."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """A lock between processes and containers that share a volume, for use in a `with` statement.

    It is the kernel's (flock on a file), so the death of its holder frees it at once, however it died. The file stays.

    Args:
        path: the lock file, made if need be.
        waiting: called about every `poll_seconds` while another process holds the lock, with the seconds waited so
            far and a text that says who holds it.
        poll_seconds: how often to try, in seconds.
        patience_seconds: give up after that long, in seconds; None waits on.
        waited: called once the lock is had, if another process held it before.

    Raises:
        StoreError: on entering, where the file cannot be made or locked, or patience ran out.
    """

    def __init__(
        self,
        path: Path,
        waiting: Callable[[float, str], None] | None = None,
        poll_seconds: float = 0.2,
        patience_seconds: float | None = None,
        waited: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._waiting, self._waited = waiting, waited
        self._poll = poll_seconds
        self._patience = patience_seconds
        self._handle = -1

    def __enter__(self) -> Lock:
        make_folder(self._path.parent)
        try:
            self._handle = self._open()
            _held.add(self._handle)
            self._acquire()
        except BaseException as fault:
            self._close()
            if isinstance(fault, OSError):
                raise _store_error(f"the lock {self._path} cannot be taken", fault) from fault
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_CLOEXEC
        try:
            handle = os.open(self._path, os.O_RDWR | flags, FILE_MODE)
        except PermissionError:
            # Another user's lock file: flock asks for no right to write.
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        take_owner_of(self._path.parent, handle)
        return handle

    def _acquire(self) -> None:
        began, is_first = time.monotonic(), True
        while not self._try():
            is_first = False
            waited = time.monotonic() - began
            if self._patience is not None and waited >= self._patience:
                raise StoreError(
                    f"{self._holder()} has held {self._path} for more than {waited:.0f} s",
                    "Wait for it to finish, or stop it.",
                )
            if self._waiting:
                self._waiting(waited, self._holder())
            time.sleep(self._poll)
        self._sign()
        if self._waited and not is_first:
            self._waited()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sign(self) -> None:
        # Who holds it is a courtesy to those who wait; on a full disk or a foreign file it is left out.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _holder(self) -> str:
        text = ""
        with contextlib.suppress(OSError):
            text = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
        return text if text.isprintable() and text else "another process"

    def _close(self) -> None:
        if self._handle in _held:
            _held.discard(self._handle)
            os.close(self._handle)
        self._handle = -1
