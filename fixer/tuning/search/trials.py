"""What one measurement says: typed records with every outcome named."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fixer.workload import Kernel


class Outcome(Enum):
    """How a trial ended."""

    OK = "ok"
    TOO_MUCH_SHARED_MEMORY = "too much shared memory"
    COMPILE_ERROR = "compile error"
    COMPILE_DEADLINE = "compile deadline"
    WRONG_RESULT = "wrong result"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Build:
    """What compiling a kernel came to; the resources are 0 where they are not known."""

    kernel: Kernel
    outcome: Outcome
    shared_bytes: int = 0
    registers: int = 0
    spills: int = 0
    compile_seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Timing:
    """One kernel's time for one row.

    Attributes:
        microseconds: median of a launch over the replays.
        least: the fastest replay's mean launch, in microseconds.
        replays: how often the row's launches were replayed for this record.
    """

    kernel: Kernel
    tokens: int
    microseconds: float
    least: float
    replays: int
