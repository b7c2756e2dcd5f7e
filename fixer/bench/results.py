"""What `moefix bench` measured: values that msgspec writes as JSON, reads and checks.

Ratios are always above 1 where the tuned configuration is better: tokens a second tuned over SGLang's own, and SGLang's
own time over the tuned one. An interval of a ratio is its lower and upper bound, 95 times in 100.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from fixer.base.files import check_file_name
from fixer.bench.passes import Count, Fraction, Interval, Load, Passes, Positive, Positives, Text, Texts, Whole

SCHEMA: Literal[2] = 2


class Kind(Enum):
    """What was timed."""

    SERVE = "serve"
    """The server under load."""
    KERNEL = "kernel"
    """SGLang's MoE layer, row by row."""


class Side(Enum):
    """One side of the comparison."""

    SGLANG = "sglang"
    TUNED = "tuned"


class Verdict(Enum):
    """What tuning came to against SGLang's own configuration."""

    FASTER = "faster"
    SLOWER = "slower"
    NEUTRAL = "neutral"
    """The difference is smaller than what the measurement itself varies by, or than is worth a word."""
    CURED = "cured"
    """SGLang's own configuration does not run on this card: there is nothing to compare with."""
    SAME = "same configuration"
    """Both sides run the same kernels under this load: what they differ by is no effect of the tuning."""
    UNDECIDED = "not decided"
    """The servers were started too seldom to know how much one start differs from the next."""


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

    card: Text
    capability: tuple[Whole, Whole]
    driver: Text
    shared_memory: Whole
    sglang: Text
    triton: Text
    torch: Text
    moefix: Text
    python: Text
    kernel_hash: Text
    cores: Whole


_NONE = Passes()


@dataclass(frozen=True)
class ServeLoad:
    """Both sides under one load.

    Attributes:
        same: both sides run the same tiles at every batch size that this load has.
        most: the ratio if the server did nothing but the MoE layer: more cannot come from tuning. None if not known.
        ratio: tokens a second, tuned over SGLang's own: the quotient of both `rate`s. None until both have a pass.
        interval: of the ratio; None until each side was started twice.
        verdict: None until both have a pass.
    """

    load: Load
    sglang: Passes = _NONE
    tuned: Passes = _NONE
    same: bool = False
    most: Positive | None = None
    ratio: Positive | None = None
    interval: Interval | None = None
    verdict: Verdict | None = None

    def side(self, side: Side) -> Passes:
        """The passes of one side."""
        return self.sglang if side is Side.SGLANG else self.tuned

    def with_side(self, side: Side, passes: Passes) -> ServeLoad:
        """With other passes of one side; ratio, interval and verdict stay as they are."""
        return replace(self, sglang=passes) if side is Side.SGLANG else replace(self, tuned=passes)

    def rate(self, side: Side) -> float | None:
        """Tokens a second of one side: output tokens, or input tokens where the load is prefill."""
        rate = self.side(side).rate
        return rate if rate is None or not self.load.is_prefill else rate * self.load.input_tokens


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

    batch: Count
    sglang_us: Positives
    tuned_us: Positives
    same: bool
    ratio: Positive | None
    round_ratios: Positives
    spread: Fraction
    margin: Fraction
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One comparison.

    Attributes:
        created: UTC, as in an artefact.
        model: its name on the hub, or its folder's own name.
        revision: as in the artefact.
        artefact: the compared artefact's file name.
        smem_limit: the pretended limit of shared memory per block in bytes, None for the card's own. SGLang's side then
            is what it would choose on a card with that limit.
        serve: by load; empty for kernels.
        rows: by batch size; empty for a server.
        ratio: geometric mean of the ratios of all rows, or of all loads under which the sides differ; None before.
        interval: of `ratio`; None before there is one.
        verdict: of all together; None before there is one.
        complete: False where it was cut short, or is still being measured.
        notes: what a reader must know, one line each.

    Raises:
        ValueError: on construction, where the parts contradict one another.
    """

    schema: Literal[2] = SCHEMA
    kind: Kind
    created: Text
    environment: BenchEnvironment
    model: Text
    revision: Text
    artefact: Text
    smem_limit: Whole | None
    serve: tuple[ServeLoad, ...] = ()
    rows: tuple[KernelRow, ...] = ()
    ratio: Positive | None = None
    interval: Interval | None = None
    verdict: Verdict | None = None
    complete: bool = False
    notes: Texts = ()

    def __post_init__(self) -> None:
        datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        check_file_name(self.artefact)
        if (self.serve if self.kind is Kind.KERNEL else self.rows) or len(self.serve) + len(self.rows) > 1024:
            raise ValueError(f"a result of kind {self.kind.value} has the other kind's rows, or too many")

    @property
    def most(self) -> float | None:
        """As a load's, of all loads under which the sides differ together; None if not known."""
        gains = [load.most for load in self.serve if not load.same]
        return statistics.geometric_mean(gain or 1.0 for gain in gains) if gains and None not in gains else None

    def to_json(self) -> str:
        """The result as a JSON text."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


def short_name(model: str) -> str:
    """A folder's own name, without the folders around it; a hub's name as it is."""
    return PurePosixPath(model).name if model.startswith(("/", "./", "../", "~")) else model
