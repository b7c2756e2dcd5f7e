"""The artefact: one finished tuning, with a decision for each row and the environment that it holds for."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from fixer.base.file_name import FileName
from fixer.base.json_reading import Reader, field_names, parse_object, plain_json
from fixer.families.family import Family
from fixer.families.registry import UNNAMED, family_named, family_of
from fixer.workload import AnyWorkload, RowTiles, Tile


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


Times = tuple[float | None, ...]
"""A time in microseconds for each product, None where it was not measured."""


@dataclass(frozen=True)
class RowChoice:
    """The tiles for one batch size, and what they rest on. Times are medians in microseconds, None if not measured.

    Attributes:
        batch: M, in tokens.
        tiles: one for each product of the family.
        us: the chosen tiles' times, one for each product; () for none measured.
        sglang_us: the times of what SGLang would have used; () for none measured.
        noise: run-to-run spread of a time, as a fraction of it.
        layer_us, sglang_layer_us: the whole layer's time through SGLang's own path, with these tiles and with SGLang's
            own.
        decision: why these tiles.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    batch: int
    tiles: RowTiles
    decision: Decision
    us: Times = ()
    sglang_us: Times = ()
    noise: float | None = None
    layer_us: float | None = None
    sglang_layer_us: float | None = None

    def __post_init__(self) -> None:
        count = len(self.tiles.tiles)
        for name in ("us", "sglang_us"):
            object.__setattr__(self, name, tuple(getattr(self, name)) or (None,) * count)
        if not 1 <= self.batch <= 1 << 24:
            raise ValueError(f"M is {self.batch}, outside 1 to 16777216")
        if not count == len(self.us) == len(self.sglang_us):
            raise ValueError(f"row {self.batch}: there are {count} tiles and not as many times")
        for value in (*self.times, *self.layer_times):
            if value is not None and not (math.isfinite(value) and 0 < value <= 1e9):
                raise ValueError(f"row {self.batch}: {value} is no time in microseconds")
        if self.noise is not None and not 0 <= self.noise <= 1000:
            raise ValueError(f"row {self.batch}: {self.noise} is no noise fraction")
        if self.decision is not Decision.FITTING_ONLY and None in self.times and None in self.layer_times:
            raise ValueError(f"row {self.batch}: {self.decision.value} without all times")

    @property
    def times(self) -> Times:
        """The medians of single kernels: the chosen ones, then SGLang's own."""
        return self.us + self.sglang_us

    @property
    def layer_times(self) -> Times:
        """The two medians of the whole layer."""
        return (self.layer_us, self.sglang_layer_us)

    @property
    def gate_up(self) -> Tile:
        """The gate-up projection's tile (an MoE layer only)."""
        return self.tiles.gate_up

    @property
    def down(self) -> Tile:
        """The down projection's tile (an MoE layer only)."""
        return self.tiles.down


MOST_NOTES, LONGEST_NOTE = 100, 4000
"""Notes of an artefact, and characters of one."""


SCHEMA = 1


@dataclass(frozen=True)
class Artefact:
    """One finished tuning: for which card, software, model and workload, and what came out.

    Attributes:
        environment: what the times were measured under.
        model: name, as the user gave it.
        revision: the hub's commit, "" where there is none.
        workload: what was tuned.
        files: SGLang's name for each product's file, "" for a product that has none of its own.
        rows: by ascending batch size.
        created: UTC, "2026-11-23T22:58:01Z".
        seconds: what tuning took.
        measured: False where the tiles are only known to fit.
        notes: what failed in single rows, one line each.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    environment: Environment
    model: str
    revision: str
    workload: AnyWorkload
    files: tuple[str, ...]
    rows: tuple[RowChoice, ...]
    created: str
    seconds: float
    measured: bool
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.family.check_names(self.files)
        FileName(self.triton_folder)
        if not all(self.files) and any(len(set(row.tiles.tiles)) > 1 for row in self.rows):
            raise ValueError("one joint file cannot hold a row of two tiles")
        if len(self.notes) > MOST_NOTES or any(len(note) > LONGEST_NOTE for note in self.notes):
            raise ValueError("there are too many notes, or a note is too long")
        batches = [row.batch for row in self.rows]
        if not 1 <= len(batches) <= 1024 or any(low >= high for low, high in itertools.pairwise(batches)):
            raise ValueError("the rows are not 1 to 1024 ascending batch sizes")
        for row in self.rows:
            self._check_row(row)
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= 1e8):
            raise ValueError(f"{self.seconds} seconds is no duration")
        if not self.measured and any(row.decision is not Decision.FITTING_ONLY for row in self.rows):
            raise ValueError("nothing was measured, and yet a row says that it was")
        datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)

    @property
    def triton_folder(self) -> str:
        """SGLang's name for the folder of its Triton's tuning files: "triton_3_6_0"."""
        return f"triton_{self.environment.triton.replace('.', '_')}"

    def _check_row(self, row: RowChoice) -> None:
        try:
            self.family.check_row(row.tiles, self.environment.sglang)
        except ValueError as error:
            raise ValueError(f"row {row.batch}: {error}") from error

    @property
    def family(self) -> Family:
        """The kernel family that was tuned."""
        return family_of(self.workload)

    @property
    def gate_up_file(self) -> str:
        """The gate-up file's name (an MoE layer only)."""
        return self.files[0]

    @property
    def down_file(self) -> str:
        """The down file's name (an MoE layer only)."""
        return self.files[1]

    def to_json(self) -> str:
        """The artefact as a JSON text with a checksum, so that a flipped bit is seen."""
        family = self.family
        plain = {
            "environment": asdict(self.environment),
            "model": self.model,
            "revision": self.revision,
            "workload": family.write_workload(self.workload),
            **{f"{p.value}_file": name for p, name in zip(family.products, self.files, strict=True)},
            "rows": [_written_row(family, row) for row in self.rows],
            "created": self.created,
            "seconds": self.seconds,
            "measured": self.measured,
            "notes": self.notes,
            "family": family.name,
            "schema": SCHEMA,
        }
        body = json.loads(json.dumps(plain, default=plain_json))
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


def _checksum(body: Mapping[str, Any]) -> str:
    # No deeper than parse_json lets through, so that the encoder's own recursion limit is never met.
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_artefact(reader: Reader) -> Artefact:
    family = family_named(reader.text("family")) if reader.has("family") else UNNAMED
    files = [f"{product.value}_file" for product in family.products]
    reader.only((field_names(Artefact) - {"files"}) | {*files, "family", "schema"})
    artefact = Artefact(
        environment=_read_environment(reader.inner("environment")),
        model=reader.text("model", 4096),
        revision=reader.text("revision"),
        workload=family.read_workload(reader.inner("workload")),
        files=tuple(reader.text(name) for name in files),
        rows=tuple(_read_row(row, family) for row in reader.each("rows")),
        created=reader.text("created"),
        seconds=reader.number("seconds"),
        measured=reader.flag("measured"),
        notes=reader.texts("notes", LONGEST_NOTE),
    )
    family.check_asked(artefact.workload, artefact.environment.card, artefact.files)
    return artefact


def _read_environment(reader: Reader) -> Environment:
    reader.only(field_names(Environment))
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


_OF_ROW = ("noise", "layer_us", "sglang_layer_us")


def _written_row(family: Family, row: RowChoice) -> dict[str, Any]:
    names = [product.value for product in family.products]
    return {
        "batch": row.batch,
        **{name: family.row_of(tile) for name, tile in zip(names, row.tiles.tiles, strict=True)},
        "decision": row.decision,
        **{f"{name}_us": value for name, value in zip(names, row.us, strict=True)},
        **{f"sglang_{name}_us": value for name, value in zip(names, row.sglang_us, strict=True)},
        **{name: getattr(row, name) for name in _OF_ROW},
    }


def _read_row(reader: Reader, family: Family) -> RowChoice:
    names = [product.value for product in family.products]
    own, sglang = [f"{name}_us" for name in names], [f"sglang_{name}_us" for name in names]
    reader.only({"batch", "decision", *names, *own, *sglang, *_OF_ROW})
    return RowChoice(
        reader.whole("batch", 1),
        RowTiles(*(family.tile_of(reader.value(name)) for name in names)),
        reader.one_of("decision", Decision),
        tuple(map(reader.optional_number, own)),
        tuple(map(reader.optional_number, sglang)),
        *map(reader.optional_number, _OF_ROW),
    )
