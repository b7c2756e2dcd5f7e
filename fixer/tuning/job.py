"""What to tune, where the time goes, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Environment
from fixer.artefacts.environment import environment_of
from fixer.base.data_folder import DataFolder
from fixer.families.family import Family
from fixer.families.registry import family_of
from fixer.kernel.compile import Target
from fixer.kernel.source import read_kernel_source
from fixer.machine.cards import Card
from fixer.sglang.tree import Tree
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Timing
from fixer.workload import Workload


@dataclass(frozen=True)
class Job:
    """What to tune, where, and for whom.

    Attributes:
        tree: SGLang's.
        workload: the layer on one shard.
        cards: the cards to measure on, all of one kind.
        rows: every M to choose for, ascending.
        model, revision: for the record.
        home: the data folder.
        exhaustive: sweep the whole space instead of searching it.
        fresh: forget what the journal has of this workload.
        layer_package: an importable `sglang` package for the finals, None for finals on the bare kernels.
    """

    tree: Tree
    workload: Workload
    cards: tuple[Card, ...]
    rows: tuple[int, ...]
    model: str
    revision: str
    home: Path
    exhaustive: bool = False
    fresh: bool = False
    layer_package: Path | None = None

    @property
    def family(self) -> Family:
        """The workload's kernel family."""
        return family_of(self.workload)

    @property
    def card(self) -> Card:
        """The kind of card."""
        return self.cards[0]

    @cached_property
    def target(self) -> Target:
        """What to compile for."""
        return Target(
            read_kernel_source(self.family.kernel_source(self.tree), self.family.kernel_names),
            self.card.arch,
            DataFolder(self.home).kernels,
            self.card.name,
        )

    @cached_property
    def environment(self) -> Environment:
        """What the measurements will depend on."""
        return environment_of(self.tree, self.card, self.family)


@dataclass
class Timeline:
    """Where the time goes: seconds by phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)
    _began: float = field(default_factory=time.monotonic)

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to this phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    Attributes:
        artefact: the rows with their verdicts.
        looks: every kernel that was tried.
        timings: the best known time of each kernel and row.
        resumed: how many of them came from the journal.
        timeline: seconds by phase.
        notes: what a user should know.
    """

    artefact: Artefact
    looks: tuple[Look, ...]
    timings: tuple[Timing, ...]
    resumed: int
    timeline: Mapping[str, float]
    notes: tuple[str, ...]
