"""A load on a server, and what the passes of one came to. msgspec reads these values and checks their bounds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

_MOST_VALUES = msgspec.Meta(max_length=100_000)

# What msgspec refuses where it reads a result: control characters, numbers and lists that are absurd.
Text = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
Texts = Annotated[tuple[Text, ...], msgspec.Meta(max_length=1000)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Wholes = Annotated[tuple[Whole, ...], _MOST_VALUES]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Positives = Annotated[tuple[Positive, ...], _MOST_VALUES]
Interval = tuple[Positive, Positive]


@dataclass(frozen=True)
class Load:
    """One kind of load on a server.

    Attributes:
        streams: requests at a time.
        input_tokens, output_tokens: of each request. One output token: the load is prefill.
        requests: in one pass.
    """

    streams: Count
    input_tokens: Count
    output_tokens: Count
    requests: Count

    @property
    def is_prefill(self) -> bool:
        """Whether only the first token is asked for."""
        return self.output_tokens == 1

    @property
    def name(self) -> str:
        """For a person: "16 streams, 512 in, 128 out"."""
        if self.is_prefill:
            return f"prefill of {self.input_tokens}" + (f", {self.streams} at a time" if self.streams > 1 else "")
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{streams}, {self.input_tokens} in, {self.output_tokens} out"


@dataclass(frozen=True)
class Pass:
    """One pass of a load.

    Attributes:
        output_tokens_per_s: over the whole pass.
        ttft_ms, itl_ms: (median, 99th percentile) of the time to the first token and between tokens; None where no
            request had one.
        failed: requests without a full answer.
        fault: of the first such request, "" without one.
    """

    output_tokens_per_s: float
    ttft_ms: tuple[float, float] | None
    itl_ms: tuple[float, float] | None
    failed: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Latency:
    """Milliseconds.

    Attributes:
        median, p99: the median over the passes of each pass's own.
        passes, p99_passes: each pass's median and 99th percentile over its requests (or tokens), in the order measured.
    """

    median: Positive
    p99: Positive
    passes: Positives
    p99_passes: Positives


@dataclass(frozen=True)
class Passes:
    """All passes of one side under one load; the i-th values of its tuples are of one pass.

    Attributes:
        output_tokens_per_s: of each pass.
        starts: which start of a server the pass ran on, counted over both sides from 0.
        ttft_ms: time to the first token; None before there is a pass.
        itl_ms: time between tokens; None where there is only one.
        files: names of the MoE tuning files that SGLang's log says it used, () for its defaults.
        failed: requests that failed, in all passes together.
    """

    output_tokens_per_s: Positives = ()
    starts: Wholes = ()
    ttft_ms: Latency | None = None
    itl_ms: Latency | None = None
    files: Texts = ()
    failed: Whole = 0

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.output_tokens_per_s):
            raise ValueError("not every pass has its start")

    @property
    def by_start(self) -> dict[int, float]:
        """Of each start, the mean logarithm of its passes' output tokens a second."""
        logs: dict[int, list[float]] = defaultdict(list)
        for start, rate in zip(self.starts, self.output_tokens_per_s, strict=True):
            logs[start].append(math.log(rate))
        return {start: statistics.fmean(values) for start, values in logs.items()}

    @property
    def rate(self) -> float | None:
        """Output tokens a second: the geometric mean over the starts, each of which counts once; None without any."""
        return math.exp(statistics.fmean(self.by_start.values())) if self.starts else None

    def plus(self, start: int, passed: Pass) -> Passes:
        """With one more pass, on that start of a server."""
        return replace(
            self,
            output_tokens_per_s=(*self.output_tokens_per_s, passed.output_tokens_per_s),
            starts=(*self.starts, start),
            ttft_ms=_with_times(self.ttft_ms, passed.ttft_ms),
            itl_ms=_with_times(self.itl_ms, passed.itl_ms),
            failed=self.failed + passed.failed,
        )


def _with_times(latency: Latency | None, times: tuple[float, float] | None) -> Latency | None:
    if times is None:
        return latency
    passes = (*(latency.passes if latency else ()), times[0])
    p99s = (*(latency.p99_passes if latency else ()), times[1])
    return Latency(round(statistics.median(passes), 3), round(statistics.median(p99s), 3), passes, p99s)
