"""What a comparison is about: a model on a kind of card, its tuning, and SGLang's own side."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fixer import __version__
from fixer.artefacts.artefact import Artefact, RowChoice
from fixer.artefacts.install import TunedFiles
from fixer.artefacts.shelf import artefact_path
from fixer.base.errors import SGLangError, StoreError
from fixer.base.files import utc_now
from fixer.base.locks import Lock
from fixer.base.progress import Progress
from fixer.base.voice import Voice
from fixer.bench.results import BenchEnvironment, BenchResult, Kind, short_name
from fixer.machine.cards import Card
from fixer.machine.driver import visible_cards
from fixer.serve.find_or_tune import artefact_for
from fixer.serve.options import MoefixOptions
from fixer.serve.run import Run
from fixer.serve.situation import OnCard, Situation, look_around
from fixer.sglang.own_choices import OwnChoice
from fixer.workload import RowTiles, Workload


@dataclass(frozen=True)
class Subject:
    """One comparison: a model on a kind of card, its artefact, and SGLang's own side.

    Attributes:
        situation: as `tune` sees it, with the pretended limit.
        on: which of its kinds of cards.
        artefact: the tuned side.
        home: the data folder.
        smem_limit: the pretended limit of shared memory per block in bytes, None for the card's own.
        card_limit: the card's own, in bytes.
    """

    situation: Situation
    on: OnCard
    artefact: Artefact
    home: Path
    smem_limit: int | None
    card_limit: int

    @property
    def card(self) -> Card:
        """The card, with the pretended limit."""
        return self.on.card

    @property
    def workload(self) -> Workload:
        """The layer on one shard."""
        workload = self.artefact.workload
        assert isinstance(workload, Workload)  # the only family that is compared so far
        return workload

    @property
    def file(self) -> str:
        """The artefact's file name."""
        return artefact_path(self.home, self.artefact.environment, self.workload).name

    @property
    def name(self) -> str:
        """For a person: the card, and the limit if there is one."""
        return self.card.name + (f" limited to {self.smem_limit} bytes" if self.smem_limit is not None else "")

    @cached_property
    def own(self) -> Callable[[int], OwnChoice]:
        """SGLang's own configuration as a function of M, as if moefix had never run.

        With a pretended limit it is the default that SGLang computes for a card with that limit: files for this card's
        name are not for such a card.
        """
        tree = self.situation.tree
        family = self.artefact.family
        lookup = family.lookup(tree, self.workload, self.card, without_moefix=True)
        if self.smem_limit is not None:
            lookup = lookup.without_files
        return family.own_choices(tree, lookup, self.workload, self.card)

    @cached_property
    def rows(self) -> Mapping[int, RowChoice]:
        """The artefact's rows by M."""
        return {row.batch: row for row in self.artefact.rows}

    @cached_property
    def tuned_files(self) -> TunedFiles:
        """The artefact's files."""
        return TunedFiles.of(self.artefact)

    def own_pair(self, batch: int) -> RowTiles:
        """What SGLang's own side runs for M."""
        return self.own(batch).tiles

    def tuned_pair(self, batch: int) -> RowTiles:
        """What the tuned side runs for M."""
        return self.row(batch).tiles

    def row(self, batch: int) -> RowChoice:
        """The artefact's row that SGLang looks up for M: the nearest, of two equally near the smaller."""
        return self.rows[min(self.rows, key=lambda row: abs(row - batch))]

    @property
    def own_files(self) -> TunedFiles | None:
        """SGLang's own side as files; None without a pretended limit, where its own tree says it best.

        A default changes once, between M = E and M = E + 1; SGLang takes the nearest row of a file, so that two rows
        are the same function of M.
        """
        if self.smem_limit is None:
            return None
        family = self.artefact.family
        rows = {tokens: self.own(tokens).tiles for tokens in family.turning_points(self.workload)}
        return TunedFiles.from_rows(family, self.artefact.files, rows, self.artefact.environment.sglang)

    def lock(self, progress: Progress) -> Lock:
        """The card for this process alone, among all that tune or measure on this data folder."""
        from fixer.tuning.turn import turn

        return turn(self.home, self.card, progress)

    def empty_result(self, kind: Kind) -> BenchResult:
        """A result with nothing measured yet."""
        environment = self.artefact.environment
        return BenchResult(
            kind=kind,
            created=utc_now(),
            environment=BenchEnvironment(
                card=self.card.name,
                capability=self.card.capability,
                driver=self.card.driver,
                shared_memory=self.card_limit,
                sglang=self.situation.tree.version,
                triton=self.situation.tree.triton,
                torch=_version("torch"),
                moefix=__version__,
                python=platform.python_version(),
                kernel_hash=environment.kernel_hash,
                cores=len(os.sched_getaffinity(0)),
            ),
            model=short_name(self.artefact.model),
            revision=self.artefact.revision,
            artefact=self.file,
            smem_limit=self.smem_limit,
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_subject(argv: Sequence[str], options: MoefixOptions, home: Path, say: Voice) -> Subject:
    """Look around, and find the artefact; tune first where there is none and `skip_tune` is not set.

    Raises:
        MoefixError: nothing to compare: no card, no such model, no MoE kernel that reads files, no artefact.
    """
    limit = options.smem_limit
    situation = look_around(argv, home=home, sglang_root=options.sglang_root, smem_limit=limit)
    on = next((on for on in situation.kinds if on.is_tunable), None)
    if on is None:
        raise SGLangError(f"There is nothing to compare: {situation.first.decision.reason}.".replace("..", "."))
    card = on.card
    if len(situation.kinds) > 1:
        say.warning(f"several kinds of cards are visible: comparing on {card.name}")
    artefact = artefact_for(Run(home, options, say), situation, on)
    if artefact is None:
        raise StoreError(
            f"There is no tuning of {situation.model.name} on {card.name} that holds here.",
            "Run `moefix tune` with the same flags first.",
        )
    real = next(real for real in visible_cards() if real.index == card.index)
    return Subject(situation, on, artefact, home, limit, real.shared_memory)
