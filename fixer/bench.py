"""SGLang's own configuration against the tuned one: what is compared, and the kernels' part of it, row by row."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from fixer import __version__
from fixer.artefacts.artefact import Artefact
from fixer.artefacts.install import Pair
from fixer.artefacts.shelf import artefact_path
from fixer.base.errors import MoefixError, SGLangError, StoreError, TuneError
from fixer.base.files import utc_now
from fixer.base.locks import Lock
from fixer.base.progress import Progress
from fixer.base.voice import Voice
from fixer.bench_results import BenchEnvironment, BenchResult, Kind
from fixer.bench_verdict import judged_row, overall_rows
from fixer.machine.cards import Card
from fixer.machine.driver import visible_cards
from fixer.machine.worker import ChildProcess, Factory, Fate
from fixer.serve.find_or_tune import artefact_for, importable_package
from fixer.serve.options import MoefixOptions
from fixer.serve.situation import TUNABLE, Situation, look_around
from fixer.sglang.own_choices import OwnChoice, own_choices
from fixer.sglang.server import OUT_OF_SHARED_MEMORY
from fixer.tuning.duel import Duel, DuelRequest
from fixer.workload import Tile, TilePair, Workload

DEFAULT_ROUNDS = 3
"""Each captures its graphs anew, on other memory, with the sides in the other order."""

Publish = Callable[[BenchResult], None]
"""Called with every state of a result that is worth keeping; the last is complete."""


@dataclass(frozen=True)
class Subject:
    """One comparison: a model on a kind of card, its artefact, and SGLang's own side.

    Attributes:
        situation: as `tune` sees it, with the pretended limit.
        kind: which of its kinds of cards.
        artefact: the tuned side.
        home: the data folder.
        smem_limit: the pretended limit of shared memory per block in bytes, None for the card's own.
        card_limit: the card's own, in bytes.
    """

    situation: Situation
    kind: int
    artefact: Artefact
    home: Path
    smem_limit: int | None
    card_limit: int

    @property
    def card(self) -> Card:
        """The card, with the pretended limit."""
        return self.situation.cards[self.kind][0]

    @property
    def workload(self) -> Workload:
        """The layer on one shard."""
        return self.artefact.workload

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
        lookup = tree.lookup(self.workload, self.card, without_moefix=True)
        if self.smem_limit is not None:
            lookup = replace(lookup, gate_up_path=None, down_path=None)
        return own_choices(tree, lookup, self.workload, self.card)

    @property
    def tuned_pair(self) -> Pair:
        """The artefact's pair of files."""
        rows = self.artefact.rows
        names = self.artefact.gate_up_file, self.artefact.down_file
        return Pair(*names, {row.batch: row.gate_up for row in rows}, {row.batch: row.down for row in rows})

    @property
    def own_pair(self) -> Pair | None:
        """SGLang's own side as a pair of files; None without a pretended limit, where its own tree says it best.

        A default changes once, between M = E and M = E + 1; SGLang takes the nearest row of a file, so that two rows
        are the same function of M.
        """
        if self.smem_limit is None:
            return None
        ups: dict[int, Tile] = {}
        downs: dict[int, Tile] = {}
        for tokens in (self.workload.experts, self.workload.experts + 1):
            choice = self.own(tokens)
            ups[tokens], downs[tokens] = choice.gate_up, choice.down
        return Pair(self.artefact.gate_up_file, self.artefact.down_file, ups, downs)

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
            model=self.artefact.model,
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
    kinds = [
        kind
        for kind, decision in enumerate(situation.decisions)
        if decision.outcome in TUNABLE and decision.workload is not None
    ]
    if not kinds:
        raise SGLangError(f"There is nothing to compare: {situation.decisions[0].reason}.".replace("..", "."))
    kind, card = kinds[0], situation.cards[kinds[0]][0]
    if len(situation.cards) > 1:
        say.warning(f"several kinds of cards are visible: comparing on {card.name}")
    workload = situation.decisions[kind].workload
    assert workload is not None
    artefact = artefact_for(situation, kind, workload, options, home, say)
    if artefact is None:
        raise StoreError(
            f"There is no tuning of {situation.model.name} on {card.name} that holds here.",
            "Run `moefix tune` with the same flags first.",
        )
    real = next(real for real in visible_cards() if real.index == card.index)
    return Subject(situation, kind, artefact, home, limit, real.shared_memory)


# --- kernels ---------------------------------------------------------------------------------------------------------


def bench_kernel(
    subject: Subject, rounds: int, progress: Progress, publish: Publish, factory: Factory | None = None
) -> BenchResult:
    """Duels of both sides' tiles for every row of the artefact, through SGLang's own layer in a process of its own.

    Args:
        rounds: how often each row is timed anew; every second time with the sides swapped.
        factory: stands in for the process that has the layer.

    Raises:
        MoefixError: the layer cannot be had, or the tuned tiles do not run.
    """
    with ExitStack() as stack:
        stack.enter_context(subject.lock(progress))
        child = ChildProcess(factory or _layer(subject), LAYER_SECONDS)
        stack.callback(child.close)
        duels = _Duels(subject, child)
        progress.phase("kernel rows", rounds * len(subject.artefact.rows))
        result = subject.empty_result(Kind.KERNEL)
        for round_ in range(rounds):
            duels.play(round_, progress)
            result = _result(result, duels, complete=round_ == rounds - 1)
            publish(result)
    return result


LAYER_SECONDS = 180.0
"""How long importing SGLang may take, its own CUDA kernels built for the first time included."""

DUEL_SECONDS = 120.0
"""How long a row may take, Triton's compiling of what is in no cache included."""


def _layer(subject: Subject) -> Factory:
    from fixer.kernel.cache import server_triton_cache
    from fixer.tuning.comparison import build_layer

    package = importable_package(subject.situation)
    if package is None:
        raise SGLangError(
            f"SGLang in {subject.situation.tree.package} is only there to be read: its layer cannot be timed.",
            "Install SGLang in this Python environment, or use the moefix image.",
        )
    most = subject.artefact.rows[-1].batch
    return partial(build_layer, package, subject.workload, subject.card.index or 0, most, server_triton_cache())


class _Duels:
    """All rows' duels so far."""

    def __init__(self, subject: Subject, child: ChildProcess) -> None:
        self._child = child
        self._tuned = {row.batch: TilePair(row.gate_up, row.down) for row in subject.artefact.rows}
        self._own: dict[int, TilePair | None] = {
            batch: TilePair(subject.own(batch).gate_up, subject.own(batch).down) for batch in self._tuned
        }
        self.by_row: dict[int, list[Duel]] = {batch: [] for batch in self._tuned}
        self.same = {batch: self._own[batch] == self._tuned[batch] for batch in self._tuned}

    def play(self, round_: int, progress: Progress) -> None:
        """One round over all rows; up the rows and down again, the sides swapped every second time."""
        for batch in list(self._tuned) if round_ % 2 == 0 else reversed(self._tuned):
            self.by_row[batch].append(self._duel(batch, swapped=round_ % 2 == 1))
            progress.advance(f"M={batch}")

    def _duel(self, batch: int, *, swapped: bool) -> Duel:
        own, tuned = self._own[batch], self._tuned[batch]
        if own is None:
            return self._ask(DuelRequest(batch, None, tuned))
        try:
            duel = self._ask(DuelRequest(batch, tuned, own) if swapped else DuelRequest(batch, own, tuned))
        except MoefixError as fault:
            if not OUT_OF_SHARED_MEMORY.search(fault.message):
                raise
            # Which of the two does not run is seen from the tuned side alone.
            self._own[batch] = None
            return self._ask(DuelRequest(batch, None, tuned))
        return replace(duel, own=duel.tuned, tuned=duel.own) if swapped else duel

    def _ask(self, request: DuelRequest) -> Duel:
        answer = self._child.ask(request, DUEL_SECONDS)
        if isinstance(answer, Fate):
            raise TuneError(f"The process that times SGLang's layer {answer.value} at M={request.tokens}.")
        assert isinstance(answer, Duel)
        return answer


def _result(result: BenchResult, duels: _Duels, *, complete: bool) -> BenchResult:
    rows = tuple(judged_row(played, same=duels.same[batch]) for batch, played in duels.by_row.items())
    ratio, margin, verdict = overall_rows(rows)
    return replace(result, rows=rows, ratio=ratio, margin=margin, verdict=verdict, complete=complete)
