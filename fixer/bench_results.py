"""What `moefix bench` measured: values, their JSON, and where they are kept (`bench/` in the data folder).

Ratios are always above 1 where the tuned configuration is better: tokens a second tuned over SGLang's own, and SGLang's
own time over the tuned one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path

from fixer.base.files import check_file_name, read_or_set_aside, write_atomically
from fixer.base.json_reading import Reader, parse_object

SCHEMA = 1

MOST_VALUES = 100_000
"""No list of a result is sensibly longer."""


class Kind(Enum):
    """What was timed."""

    SERVE = "serve"
    """The server under load."""
    KERNEL = "kernel"
    """SGLang's MoE layer, row by row."""


class Verdict(Enum):
    """What tuning came to against SGLang's own configuration."""

    FASTER = "faster"
    SLOWER = "slower"
    NEUTRAL = "neutral"
    """The difference does not clear what the measurement itself varies by."""
    CURED = "cured"
    """SGLang's own configuration does not run on this card: there is nothing to compare with."""


@dataclass(frozen=True)
class BenchEnvironment:
    """Where it was measured.

    Attributes:
        card, capability, driver: as in an artefact's environment.
        shared_memory: the card's own opt-in limit in bytes, whatever `smem_limit` pretends.
        sglang, triton, torch, moefix, python: versions; "" where not known.
        kernel_hash: of SGLang's kernel source, in hex.
        cores: processors that this process may use.
    """

    card: str
    capability: tuple[int, int]
    driver: str
    shared_memory: int
    sglang: str
    triton: str
    torch: str
    moefix: str
    python: str
    kernel_hash: str
    cores: int


@dataclass(frozen=True)
class Load:
    """One kind of load on a server.

    Attributes:
        streams: requests at a time.
        input_tokens, output_tokens: of each request. One output token: the load is prefill.
        requests: in one pass.
    """

    streams: int
    input_tokens: int
    output_tokens: int
    requests: int

    @property
    def is_prefill(self) -> bool:
        """Whether only the first token is asked for."""
        return self.output_tokens == 1

    def __str__(self) -> str:
        return f"{self.streams}:{self.input_tokens}:{self.output_tokens}:{self.requests}"

    @property
    def name(self) -> str:
        """For a person: "16 streams, 512 in, 128 out"."""
        if self.is_prefill:
            return f"prefill of {self.input_tokens}" + (f", {self.streams} at a time" if self.streams > 1 else "")
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{streams}, {self.input_tokens} in, {self.output_tokens} out"


@dataclass(frozen=True)
class Latency:
    """Milliseconds.

    Attributes:
        median, p99: the median over the passes of each pass's own.
        passes, p99_passes: each pass's median and 99th percentile over its requests (or tokens), in the order measured.
    """

    median: float
    p99: float
    passes: tuple[float, ...]
    p99_passes: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One side of the comparison under one load; the i-th values of its tuples are of one pass.

    Attributes:
        output_tokens_per_s: of each pass.
        starts: which start of a server the pass ran on, counted over both arms from 0.
        ttft_ms: time to the first token; None before there is a pass.
        itl_ms: time between tokens; None where there is only one.
        files: names of the MoE tuning files that SGLang's log says it used, [] for its defaults.
        failed: requests that failed, in all passes together.
    """

    output_tokens_per_s: tuple[float, ...] = ()
    starts: tuple[int, ...] = ()
    ttft_ms: Latency | None = None
    itl_ms: Latency | None = None
    files: tuple[str, ...] = ()
    failed: int = 0


@dataclass(frozen=True)
class Arms:
    """Both sides."""

    sglang: Arm = Arm()
    tuned: Arm = Arm()


@dataclass(frozen=True)
class ServeLoad:
    """Both sides under one load. The last four are None until both have a pass.

    Attributes:
        ratio: tokens a second, tuned over SGLang's own.
        spread: the widest distance between two passes of the same side, as a fraction.
        margin: what the ratio has to differ from 1 by, as a fraction, to count.
    """

    load: Load
    arms: Arms
    ratio: float | None = None
    spread: float | None = None
    margin: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class KernelRow:
    """One batch size through SGLang's own layer, microseconds a forward; the i-th times belong together.

    Attributes:
        batch: M, in tokens.
        sglang_us, tuned_us: times; SGLang's own are empty where it does not run on this card.
        same: both sides have the same tiles, so that the difference is noise itself.
        ratio: SGLang's own median over the tuned one; None where there is no own.
        round_ratios: the same ratio of each round of measuring.
        spread: the middle half of the times, as a fraction of the median; the wider of both sides.
        margin: what the ratio has to differ from 1 by, as a fraction, to count.
    """

    batch: int
    sglang_us: tuple[float, ...]
    tuned_us: tuple[float, ...]
    same: bool
    ratio: float | None
    round_ratios: tuple[float, ...]
    spread: float
    margin: float
    verdict: Verdict


@dataclass(frozen=True)
class BenchResult:
    """One comparison.

    Attributes:
        created: UTC, as in an artefact.
        model, revision: as in the artefact.
        artefact: the compared artefact's file name.
        smem_limit: the pretended limit of shared memory per block in bytes, None for the card's own. SGLang's side then
            is what it would choose on a card with that limit.
        client: what made the load: "sglang.bench_serving" or "token ids"; "" for kernels.
        serve: by load; empty for kernels.
        rows: by batch size; empty for a server.
        ratio: geometric mean of all loads' or rows' ratios, None before there is one.
        margin: what `ratio` has to differ from 1 by.
        verdict: of all together; None before there is one.
        complete: False where it was cut short, or is still being measured.
        notes: what a reader must know, one line each.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    kind: Kind
    created: str
    environment: BenchEnvironment
    model: str
    revision: str
    artefact: str
    smem_limit: int | None
    client: str = ""
    serve: tuple[ServeLoad, ...] = ()
    rows: tuple[KernelRow, ...] = ()
    ratio: float | None = None
    margin: float | None = None
    verdict: Verdict | None = None
    complete: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        check_file_name(self.artefact)
        if (self.serve if self.kind is Kind.KERNEL else self.rows) or len(self.serve) + len(self.rows) > 1024:
            raise ValueError(f"a result of kind {self.kind.value} has the other kind's rows, or too many")
        for row in self.serve:
            for arm in (row.arms.sglang, row.arms.tuned):
                if len(arm.starts) != len(arm.output_tokens_per_s):
                    raise ValueError(f"{row.load.name}: not every pass has its start")

    def to_json(self) -> str:
        """The result as a JSON text."""
        body = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(body, indent=1, default=lambda member: member.value) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes) -> BenchResult:
        """The result in a JSON text that may be damaged or hostile.

        Raises:
            ValueError: anything at all is not as `to_json` writes it; the text says what.
        """
        body = parse_object(content, SCHEMA)
        return _read_result(Reader(body, "result"))


def headline(result: BenchResult) -> str:
    """One line that says what came out."""
    what = "the server" if result.kind is Kind.SERVE else "SGLang's MoE layer"
    if result.verdict is None or result.ratio is None or result.margin is None:
        return f"{what}: nothing to compare yet" if result.verdict is not Verdict.CURED else f"{what}: runs only tuned"
    percent = 100 * (result.ratio - 1)
    by = f"{percent:+.1f} % over all {'loads' if result.kind is Kind.SERVE else 'rows'}"
    if result.verdict is Verdict.NEUTRAL:
        verdicts = {load.verdict for load in result.serve} | {row.verdict for row in result.rows}
        split = verdicts >= {Verdict.FASTER, Verdict.SLOWER}
        why = "some faster, some slower" if split else f"within {100 * result.margin:.1f} %"
        return f"{what}: neutral ({by}, {why})"
    return f"{what}: {result.verdict.value} with the tuned configuration ({by})"


# --- reading ---------------------------------------------------------------------------------------------------------


def _only(reader: Reader, kind: type, *more: str) -> None:
    reader.only({field.name for field in fields(kind)} | set(more))


def _numbers(reader: Reader, name: str) -> tuple[float, ...]:
    values = reader.value(name)
    if not isinstance(values, list) or len(values) > MOST_VALUES:
        raise ValueError(f"{name} is not a list of bearable length")
    inner = Reader({str(place): value for place, value in enumerate(values)}, name)
    numbers = tuple(inner.number(str(place)) for place in range(len(values)))
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"{name} has a value that is not above zero")
    return numbers


def _wholes(reader: Reader, name: str) -> tuple[int, ...]:
    values = reader.value(name)
    if not isinstance(values, list) or len(values) > MOST_VALUES:
        raise ValueError(f"{name} is not a list of bearable length")
    inner = Reader({str(place): value for place, value in enumerate(values)}, name)
    return tuple(inner.whole(str(place)) for place in range(len(values)))


def _texts(reader: Reader, name: str) -> tuple[str, ...]:
    values = reader.value(name)
    if not isinstance(values, list) or len(values) > 1000:
        raise ValueError(f"{name} is not a list of bearable length")
    inner = Reader({str(place): value for place, value in enumerate(values)}, name)
    return tuple(inner.text(str(place)) for place in range(len(values)))


def _verdict(reader: Reader) -> Verdict | None:
    return None if reader.value("verdict") is None else reader.one_of("verdict", Verdict)


def _read_result(reader: Reader) -> BenchResult:
    _only(reader, BenchResult, "schema")
    return BenchResult(
        kind=reader.one_of("kind", Kind),
        created=reader.text("created"),
        environment=_read_environment(reader.inner("environment")),
        model=reader.text("model", 4096),
        revision=reader.text("revision"),
        artefact=reader.text("artefact"),
        smem_limit=None if reader.value("smem_limit") is None else reader.whole("smem_limit"),
        client=reader.text("client"),
        serve=tuple(_read_load(row) for row in reader.each("serve")),
        rows=tuple(_read_row(row) for row in reader.each("rows")),
        ratio=reader.optional_number("ratio"),
        margin=reader.optional_number("margin"),
        verdict=_verdict(reader),
        complete=reader.flag("complete"),
        notes=_texts(reader, "notes"),
    )


def _read_environment(reader: Reader) -> BenchEnvironment:
    _only(reader, BenchEnvironment)
    texts = ("card", "driver", "sglang", "triton", "torch", "moefix", "python", "kernel_hash")
    return BenchEnvironment(
        capability=reader.pair("capability"),
        shared_memory=reader.whole("shared_memory"),
        cores=reader.whole("cores"),
        **{name: reader.text(name) for name in texts},
    )


def _read_load(reader: Reader) -> ServeLoad:
    _only(reader, ServeLoad)
    load, arms = reader.inner("load"), reader.inner("arms")
    _only(load, Load)
    _only(arms, Arms)
    return ServeLoad(
        load=Load(**{field.name: load.whole(field.name, 1, 1 << 24) for field in fields(Load)}),
        arms=Arms(_read_arm(arms.inner("sglang")), _read_arm(arms.inner("tuned"))),
        ratio=reader.optional_number("ratio"),
        spread=reader.optional_number("spread"),
        margin=reader.optional_number("margin"),
        verdict=_verdict(reader),
    )


def _read_arm(reader: Reader) -> Arm:
    _only(reader, Arm)
    return Arm(
        output_tokens_per_s=_numbers(reader, "output_tokens_per_s"),
        starts=_wholes(reader, "starts"),
        ttft_ms=_read_latency(reader, "ttft_ms"),
        itl_ms=_read_latency(reader, "itl_ms"),
        files=_texts(reader, "files"),
        failed=reader.whole("failed"),
    )


def _read_latency(reader: Reader, name: str) -> Latency | None:
    if reader.value(name) is None:
        return None
    inner = reader.inner(name)
    _only(inner, Latency)
    passes = (_numbers(inner, "passes"), _numbers(inner, "p99_passes"))
    return Latency(inner.number("median"), inner.number("p99"), *passes)


def _read_row(reader: Reader) -> KernelRow:
    _only(reader, KernelRow)
    return KernelRow(
        batch=reader.whole("batch", 1),
        sglang_us=_numbers(reader, "sglang_us"),
        tuned_us=_numbers(reader, "tuned_us"),
        same=reader.flag("same"),
        ratio=reader.optional_number("ratio"),
        round_ratios=_numbers(reader, "round_ratios"),
        spread=reader.number("spread"),
        margin=reader.number("margin"),
        verdict=reader.one_of("verdict", Verdict),
    )


# --- in the data folder ----------------------------------------------------------------------------------------------


def result_path(home: Path, result: BenchResult) -> Path:
    """Where a result is kept: bench/<artefact's stem>-<kind>-<UTC>.json."""
    stamp = result.created.replace("-", "").replace(":", "")
    return home / "bench" / f"{result.artefact.removesuffix('.json')}-{result.kind.value}-{stamp}.json"


def save_result(path: Path, result: BenchResult) -> None:
    """Write a result in one step, in place of an earlier state of it.

    Raises:
        StoreError: it cannot be written.
    """
    write_atomically(path, result.to_json().encode())


def results_for(home: Path, artefact: str) -> tuple[BenchResult, ...]:
    """The kept results for an artefact's file name, the newest first. A damaged one is moved aside and passed over."""
    return tuple(sorted(_results(home, artefact), key=lambda result: result.created, reverse=True))


def _results(home: Path, artefact: str) -> Iterator[BenchResult]:
    try:
        paths = [path for path in (home / "bench").iterdir() if path.suffix == ".json"]
    except OSError:
        return
    for path in sorted(path for path in paths if path.name.startswith(artefact.removesuffix(".json") + "-")):
        result, _ = read_or_set_aside(path, BenchResult.from_json)
        if result is not None and result.artefact == artefact:
            yield result
