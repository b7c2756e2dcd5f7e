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
from fixer.base.files import check_file_name
from fixer.base.json_reading import Reader, field_names, parse_object, plain_json
from fixer.sglang.file_names import pairs_of_names
from fixer.sglang.releases import release_key
from fixer.workload import NumberFormat, Tile, Workload, check_tile


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


MOST_NOTES, LONGEST_NOTE = 100, 4000
"""Notes of an artefact, and characters of one."""


def gate_up_may_describe(sglang: str) -> bool:
    """Whether a release takes USE_TMA out of a gate-up file; 0.5.17 hands it to a kernel that does not know it."""
    return release_key(sglang) >= (0, 5, 18)


SCHEMA = 1


@dataclass(frozen=True)
class Artefact:
    """One finished tuning: for which card, software, model and workload, and what came out.

    Attributes:
        environment: what the times were measured under.
        model: name, as the user gave it.
        revision: the hub's commit, "" where there is none.
        workload: the layer that was tuned.
        gate_up_file, down_file: SGLang's names for the two files; `down_file` is "" for a release that reads one joint
            file, whose rows then have one tile for both projections.
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
    workload: Workload
    gate_up_file: str
    down_file: str
    rows: tuple[RowChoice, ...]
    created: str
    seconds: float
    measured: bool
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in filter(None, (self.gate_up_file, self.down_file)):
            check_file_name(name)
        FileName(self.triton_folder)
        if self.gate_up_file == self.down_file:
            raise ValueError("gate_up and down have one file name")
        if not self.down_file and any(row.gate_up != row.down for row in self.rows):
            raise ValueError("one joint file cannot hold a row of two tiles")
        if any(row.gate_up.use_tma for row in self.rows) and not gate_up_may_describe(self.environment.sglang):
            raise ValueError("USE_TMA breaks SGLang before 0.5.18 in a gate_up file")
        if len(self.notes) > MOST_NOTES or any(len(note) > LONGEST_NOTE for note in self.notes):
            raise ValueError("there are too many notes, or a note is too long")
        batches = [row.batch for row in self.rows]
        if not 1 <= len(batches) <= 1024 or any(low >= high for low, high in itertools.pairwise(batches)):
            raise ValueError("the rows are not 1 to 1024 ascending batch sizes")
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= 1e8):
            raise ValueError(f"{self.seconds} seconds is no duration")
        if not self.measured and any(row.decision is not Decision.FITTING_ONLY for row in self.rows):
            raise ValueError("nothing was measured, and yet a row says that it was")
        datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)

    @property
    def triton_folder(self) -> str:
        """SGLang's name for the folder of its Triton's tuning files: "triton_3_6_0"."""
        return f"triton_{self.environment.triton.replace('.', '_')}"

    def to_json(self) -> str:
        """The artefact as a JSON text with a checksum, so that a flipped bit is seen."""
        body = json.loads(json.dumps(asdict(self), default=plain_json))
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


def _checksum(body: Mapping[str, Any]) -> str:
    # No deeper than parse_json lets through, so that the encoder's own recursion limit is never met.
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_artefact(reader: Reader) -> Artefact:
    reader.only(field_names(Artefact) | {"schema"})
    artefact = Artefact(
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
        notes=reader.texts("notes", LONGEST_NOTE),
    )
    _check_names(artefact)
    return artefact


def _check_names(artefact: Artefact) -> None:
    """Refuse file names that are not those of the artefact's layer: installed, they would change another model's."""
    pairs = pairs_of_names(artefact.workload, artefact.environment.card)
    given = (artefact.gate_up_file, artefact.down_file)
    if given not in pairs:
        name, wanted = next((mine, its) for mine, its in zip(given, pairs[0], strict=True) if mine != its)
        raise ValueError(f"it names the file {name}, and its layer's is {wanted}")


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


def _read_workload(reader: Reader) -> Workload:
    reader.only(field_names(Workload))
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
    reader.only(field_names(RowChoice))
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
