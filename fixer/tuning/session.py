"""Tune one workload on the cards of one kind: from candidates to an artefact with a verdict for every row."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from fixer import __version__
from fixer.kernel.pool import AdaptiveDeadline, FixedDeadline
from fixer.base.errors import CardError, MoefixError, SGLangError, TuneError
from fixer.machine.cards import Card, occupancy
from fixer.kernel.compile import Candidate, Target, read_kernel_source
from fixer.kernel.arguments import Product
from fixer.base.progress import Progress
from fixer.sglang.tree import Lookup, Tree, own_choices
from fixer.artefacts.shelf import Artefact, Decision, Environment, Lock, RowChoice, earlier_tiles, safe_name, utc_now
from fixer.tuning.duel import Duel, DuelRequest, KernelDuel, LEAST_GAIN, TilePair
from fixer.tuning.journal import Journal, JournaledRunner, RunKey
from fixer.machine.worker import ChildProcess, Fate, Handler
from fixer.tuning.measure.memory import full_rotation, layer_room, needed_bytes, rotations, with_spare
from fixer.tuning.search.runner import Look, look_closer, run_rounds
from fixer.tuning.search.search import Limits, Search
from fixer.tuning.search.seeds import seeds
from fixer.kernel.space import BOTH, Space
from fixer.tuning.search.trials import Outcome, Timing
from fixer.tuning.precompile import server_candidates, server_triton_cache
from fixer.workload import Projection, Tile, Workload

if TYPE_CHECKING:
    from fixer.tuning.measure.card_runner import CardRunner

DUEL_SECONDS = 60.0
"""A row's duel may take this long; the first one may build SGLang's own CUDA kernels (see LAYER_START_SECONDS)."""

EXTRA_DUELS = 2
"""How often a row that is too close to call is timed again."""

LARGEST_L2 = 128 << 20
"""Bytes: no card has a larger L2 cache (B200: 126 MiB); which this one has is known to the measuring process only."""

SMALLEST_L2 = 1 << 20
"""Bytes: no card that Triton compiles for has less (Jetson)."""

SECOND_LOOK_SECONDS = 1.5
"""The driver's load is that of up to a second before."""

CONTEXTS = 1 << 30
"""Bytes that two processes' CUDA contexts and libraries take on a card, about."""

LAYER_START_SECONDS = 90.0
"""How long the finals wait for SGLang to be imported before they go on without its layer."""


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
    def card(self) -> Card:
        """The kind of card."""
        return self.cards[0]

    @cached_property
    def target(self) -> Target:
        """What to compile for."""
        return Target(read_kernel_source(self.tree.kernel_source), self.card.arch, self.home / "kernels")

    @cached_property
    def environment(self) -> Environment:
        """What the measurements will depend on."""
        return environment_of(self.tree, self.card)


def environment_of(tree: Tree, card: Card) -> Environment:
    """Everything that makes an artefact hold or not."""
    return Environment(
        card=card.name,
        capability=card.capability,
        shared_memory=card.shared_memory,
        driver=card.driver,
        triton=tree.triton,
        sglang=tree.version,
        kernel_hash=read_kernel_source(tree.kernel_source).sha256,
        moefix=__version__,
    )


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


def tune(job: Job, progress: Progress) -> Tuned:
    """Search, warm the server's kernel cache, hold the finals; to be called in one's `turn`.

    Raises:
        MoefixError: measuring failed as a whole; what was measured is in the journal.
    """
    if not job.tree.reads_down_file:
        raise SGLangError(
            f"SGLang {job.tree.version} reads one joint file for both projections, which moefix does not tune.",
            f"Use SGLang 0.5.17 or newer; `moefix plan` works for {job.tree.version} too.",
        )
    return _Session(job, progress).run()


def turn(home: Path, card: Card, progress: Progress) -> Lock:
    """The right to tune on a kind of card, among all that share the data folder; for use in a `with` statement.

    Whoever had to wait finds the other's result in the data folder: it is kept before the turn ends.
    """
    lock = home / "locks" / f"{safe_name(card.sglang_name)}.lock"
    is_said = False

    def say_who(seconds: float, holder: str) -> None:
        nonlocal is_said
        if not is_said:
            progress.note(f"another moefix is tuning on this volume ({holder}); waiting for it")
        is_said = True

    return Lock(lock, waiting=say_who, waited=lambda: progress.note("the other moefix is done; going on"))


def state_of_cards(job: Job) -> tuple[str, ...]:
    """What else uses the cards, one line for each that is not free for measuring.

    Raises:
        CardError: so little memory is free that no layout of the weights fits (`tuning.room`).
    """
    lines: list[str] = []
    for card in job.cards:
        found = occupancy(card)
        if found.is_busy:  # perhaps with the end of what another moefix did
            time.sleep(SECOND_LOOK_SECONDS)
            found = occupancy(card)
        who = f"{card.name} (device {card.index or 0})"
        if found.is_busy:
            lines.append(
                f"{who} is {found.busy_percent} % busy, held {found.held_by()}: its times will be less certain"
            )
        if found.free_mib is None:
            continue
        free, products = found.free_mib << 20, {p: Product(job.workload, p, job.rows[-1]) for p in BOTH}
        state = f"{found.free_mib} of {card.memory_mib} MiB are free on {who}, which is held {found.held_by()}"
        if rotations(products, SMALLEST_L2, free) is None:
            raise CardError(f"Too little to tune: {state}.", "Stop what else uses the card, and try again.")
        if (
            with_spare(sum(needed_bytes(product, full_rotation(product, LARGEST_L2)) for product in products.values()))
            > free
        ):
            lines.append(f"{state}: tuning takes smaller weights")
    return tuple(lines)


class _Session:
    """One tuning run."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._timeline = Timeline()
        self._notes: list[str] = []
        self._layer_failed = False
        self._warmed: set[Candidate] = set()
        self._target = job.target
        # What SGLang would run if moefix had never installed anything.
        self._lookup: Lookup = job.tree.lookup(job.workload, job.card, without_moefix=True)
        choose = own_choices(job.tree, self._lookup, job.workload, job.card)
        self._own = {tokens: TilePair(choose(tokens).gate_up, choose(tokens).down) for tokens in job.rows}

    def run(self) -> Tuned:
        job = self._job
        with ExitStack() as stack:
            journal = Journal(job.home / "journal.sqlite", RunKey(job.environment, job.workload))
            stack.callback(journal.close)
            self._notes += journal.notes
            if job.fresh:
                journal.forget()
            runner = stack.enter_context(self._card_runner())
            layer = self._start_layer(stack)
            journaled = JournaledRunner(runner, journal)
            search = self._search()
            looks = self._run_rounds(search, journaled)
            self._warm(runner, self._choices(search))
            look_closer(search, journaled)
            self._timeline.mark("closer looks")
            chosen = self._choices(search)
            self._warm(runner, chosen)
            for _ in runner.finish_compiling():
                self._progress.advance()
            self._timeline.mark("compiling for the server")
            rows = self._finals(
                {tokens: self._alternatives(search, tokens) for tokens in job.rows}, runner, layer, looks
            )
            self._timeline.mark("finals")
            best_known = {(timing.kernel, timing.tokens): timing for timing in journal.timings()}
            timings = tuple(timing for (kernel, _), timing in best_known.items() if kernel in looks)
            if runner.restarts:
                self._notes.append(f"the measuring process was started anew {runner.restarts} times")
        shutil.rmtree(self._scratch, ignore_errors=True)  # the journal has all that was learnt from it
        artefact = Artefact(
            environment=job.environment,
            model=job.model,
            revision=job.revision,
            workload=job.workload,
            gate_up_file=self._lookup.gate_up,
            down_file=self._lookup.down,
            rows=rows,
            created=utc_now(),
            seconds=round(self._timeline.total, 1),
            measured=True,
        )
        return Tuned(
            artefact, tuple(looks.values()), timings, journaled.resumed, self._timeline.seconds, tuple(self._notes)
        )

    # ---- search

    def _card_runner(self) -> CardRunner:
        try:
            from fixer.tuning.measure.card_runner import CardRunner
        except ImportError as error:
            raise TuneError(
                f"Measuring needs PyTorch, and {error.name} is not installed.", "Use SGLang's Python."
            ) from error
        job = self._job
        return CardRunner(
            job.workload,
            self._target,
            devices=[card.index or 0 for card in job.cards],
            rows=job.rows,
            shared_limit=job.card.shared_memory,
            folder=self._scratch,
            patient=self._own_tiles,
            deadline=FixedDeadline(60.0) if job.exhaustive else AdaptiveDeadline(),
        )

    @property
    def _scratch(self) -> Path:
        """Triton's cache folder for candidates; a resumed run finds there what was compiled before it was killed."""
        return self._job.home / "cache" / "triton-search" / safe_name(self._job.card.sglang_name)

    @property
    def _own_tiles(self) -> list[Tile]:
        """SGLang's own configurations of all rows, each once."""
        return list(dict.fromkeys(tile for pair in self._own.values() for tile in (pair.gate_up, pair.down)))

    def _search(self) -> Search:
        job = self._job
        own = self._own_tiles
        if job.exhaustive:
            everything = tuple(Space(job.workload).all())
            limits = Limits(seeds=2 * len(everything), kernels=2 * (len(everything) + len(own)))
            return Search(job.workload, job.rows, everything, own, limits)
        earlier = earlier_tiles(job.home, job.workload)
        return Search(job.workload, job.rows, seeds(job.tree.shipped_files(), job.workload, job.card, earlier), own)

    def _run_rounds(self, search: Search, runner: JournaledRunner) -> dict[object, Look]:
        looks: dict[object, Look] = {}
        self._progress.phase("search", search.limits.kernels)

        def on_look(look: Look) -> None:
            if not looks:
                self._timeline.mark("start")
            looks[look.build.kernel] = look
            self._progress.advance(f"{look.build.kernel.projection.value} {look.build.kernel.tile}")

        run_rounds(search, runner, on_look)
        self._timeline.mark("search")
        good = sum(look.build.outcome is Outcome.OK for look in looks.values())
        self._progress.note(
            f"searched {len(looks)} kernels in {self._timeline.total:.1f} s"
            f" ({good} usable, {runner.resumed} known from the journal)"
        )
        return looks

    def _choices(self, search: Search) -> dict[int, TilePair]:
        chosen = {}
        for tokens in self._job.rows:
            pairs = self._alternatives(search, tokens)
            if not pairs:
                raise TuneError(
                    f"Not one configuration could be timed for M={tokens}.",
                    "The data folder's journal.sqlite says why; to serve without tuning: --moefix-skip-tune.",
                )
            chosen[tokens] = pairs[0]
        return chosen

    # ---- what the server will compile

    def _warm(self, runner: CardRunner, chosen: Mapping[int, TilePair]) -> None:
        """Have both sides of each duel compiled, so that any verdict finds its kernels in the server's cache."""
        job = self._job
        candidates = server_candidates(job.workload, chosen, job.rows[-1])
        candidates += server_candidates(job.workload, self._own, job.rows[-1])
        fresh = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self._warmed]
        self._warmed.update(fresh)
        runner.compile_ahead(fresh, server_triton_cache())
        # What the finals load; after a resumed run's start it may be in no cache any more.
        tiles = [pair.kernels for pair in (*chosen.values(), *self._own.values()) if not pair.use_tma]
        finals = {Candidate(job.workload, kernel.projection, kernel.tile) for kernels in tiles for kernel in kernels}
        runner.compile_ahead(sorted(finals - self._warmed, key=str), self._scratch)
        self._warmed.update(finals)
        self._progress.phase("compiling for the server", runner.to_compile)

    # ---- finals

    def _start_layer(self, stack: ExitStack) -> ChildProcess | None:
        """Begin to import SGLang now; it takes about as long as the search."""
        job = self._job
        if job.layer_package is None or not self._has_room_for_layer():
            return None
        factory = partial(
            build_layer, job.layer_package, job.workload, job.card.index or 0, job.rows[-1], server_triton_cache()
        )
        child = ChildProcess(factory, LAYER_START_SECONDS)
        stack.callback(child.close)
        child.start()
        return child

    def _has_room_for_layer(self) -> bool:
        """Whether SGLang's layer fits on the card beside the measuring process, which comes first."""
        free = occupancy(self._job.card).free_mib
        if free is None:
            return True
        workload, most = self._job.workload, self._job.rows[-1]
        products = [Product(workload, projection, most) for projection in BOTH]
        measuring = sum(needed_bytes(product, full_rotation(product, LARGEST_L2)) for product in products)
        needed = with_spare(measuring) + layer_room(workload, most, LARGEST_L2)[1] + CONTEXTS
        if needed <= free << 20:
            return True
        self._notes.append(
            "the finals ran on the bare kernels, not through SGLang's layer:"
            f" that takes {needed >> 20} MiB on the card, and {free} were free"
        )
        return False

    def _finals(
        self,
        alternatives: Mapping[int, Sequence[TilePair]],
        runner: CardRunner,
        layer: ChildProcess | None,
        looks: Mapping[object, Look],
    ) -> tuple[RowChoice, ...]:
        """A verdict for every row; a winner that dies over it gives way to the next."""
        self._progress.phase("finals", len(alternatives))
        rows = []
        for tokens, pairs in alternatives.items():
            rows.append(self._row(tokens, pairs, runner, layer, looks))
            self._progress.advance(f"M={tokens}")
        return tuple(rows)

    def _row(
        self,
        tokens: int,
        pairs: Sequence[TilePair],
        runner: CardRunner,
        layer: ChildProcess | None,
        looks: Mapping[object, Look],
    ) -> RowChoice:
        sglang_own = self._own[tokens]
        runs = self._runs(sglang_own, looks)
        for tuned in pairs:
            request = DuelRequest(tokens, sglang_own if runs and sglang_own != tuned else None, tuned)
            layer_duel = self._settled(layer, request)
            kernel_duel = self._kernel_duel(runner, request)
            if layer_duel is not None or kernel_duel is not None:
                return row_choice(request, sglang_own, layer_duel, kernel_duel)
            self._notes.append(f"M={tokens}: the finals could not time {tuned.gate_up} / {tuned.down}")
        if not runs:
            raise TuneError(f"The finals could not time M={tokens}.", "Run `moefix tune` again: it goes on from here.")
        return RowChoice(tokens, sglang_own.gate_up, sglang_own.down, Decision.FITTING_ONLY)

    @staticmethod
    def _alternatives(search: Search, tokens: int) -> list[TilePair]:
        """The best pair of each BLOCK_SIZE_M, the fastest first."""
        return [
            TilePair(pair.tiles[Projection.GATE_UP], pair.tiles[Projection.DOWN]) for pair in search.best_pairs(tokens)
        ]

    @staticmethod
    def _runs(pair: TilePair, looks: Mapping[object, Look]) -> bool:
        """Whether SGLang's own pair runs on this card; a TMA tile is not tried by the search and has its duel."""
        known = [looks[kernel] for kernel in pair.kernels if kernel in looks]
        return all(look.build.outcome is Outcome.OK for look in known)

    def _settled(self, layer: ChildProcess | None, request: DuelRequest) -> Duel | None:
        """A duel through the layer, repeated where a gain is there but does not clear the noise yet."""
        duel = self._layer_duel(layer, request)
        for _ in range(EXTRA_DUELS):
            if duel is None or not duel.own or duel.is_won or duel.gain < LEAST_GAIN:
                return duel
            again = self._layer_duel(layer, request)
            duel = duel.joined(again) if again is not None else duel
        return duel

    def _layer_duel(self, layer: ChildProcess | None, request: DuelRequest) -> Duel | None:
        if layer is None or self._layer_failed:
            return None
        try:
            answer = layer.ask(request, DUEL_SECONDS)
        except MoefixError as error:
            answer, why = None, error.message
        else:
            why = answer.value if isinstance(answer, Fate) else ""
        if isinstance(answer, Duel):
            return answer
        self._layer_failed = True
        self._notes.append(f"the finals ran on the bare kernels, not through SGLang's layer: {why}")
        return None

    @staticmethod
    def _kernel_duel(runner: CardRunner, request: DuelRequest) -> KernelDuel | None:
        own = None if request.own is None or request.own.use_tma else request.own
        if request.tuned.use_tma:
            return None
        return runner.duel(DuelRequest(request.tokens, own, request.tuned))


def build_layer(package: Path, workload: Workload, device: int, most_tokens: int, cache: Path) -> Handler:
    """What answers duels through SGLang's own layer; runs in a child process (`ChildProcess`).

    Args:
        package: SGLang's.
        workload, device, most_tokens: as for `LayerSetup`.
        cache: Triton's cache folder.
    """
    import os

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from fixer.tuning.measure.layer_bench import LayerSetup, layer_handler

    return layer_handler(LayerSetup(package, workload, device, most_tokens))


def row_choice(request: DuelRequest, sglang_own: TilePair, layer: Duel | None, kernels: KernelDuel | None) -> RowChoice:
    """A row's verdict from its duels.

    Args:
        request: what was timed; its `own` is None where SGLang's own is the winner itself, or does not run.
        sglang_own: SGLang's own pair, timed or not.
        layer: the duel through SGLang's layer, None where there was none: then the kernels' duel decides.
        kernels: the duel of the bare kernels, for the single kernels' times.

    Raises:
        TuneError: nothing was timed.
    """
    judge = layer or (kernels.duel if kernels else None)
    if judge is None:
        raise TuneError(f"The finals could not time M={request.tokens}.")
    same = request.tuned == sglang_own
    unjudged = request.own is not None and not judge.own  # a TMA file, and no layer to time it through
    keeps = same or unjudged or (request.own is not None and not judge.is_won)
    pair = sglang_own if keeps else request.tuned
    medians = kernels.medians if kernels else {}

    def median_of(pair: TilePair, projection: int) -> float | None:
        return medians.get(pair.kernels[projection])

    layer_us = statistics.median(layer.tuned) if layer else None
    own_layer_us = statistics.median(layer.own) if layer and layer.own else (layer_us if same else None)
    times = (median_of(pair, 0), median_of(pair, 1), median_of(sglang_own, 0), median_of(sglang_own, 1))
    layer_times = (own_layer_us if keeps else layer_us, own_layer_us)
    decision = Decision.KEPT_SGLANG if keeps else Decision.TUNED
    if None in times and None in layer_times:
        decision = Decision.FITTING_ONLY
    noise = judge.noise if judge.own and judge.noise < 1000 else None
    return RowChoice(request.tokens, pair.gate_up, pair.down, decision, *times, noise, *layer_times)


def covers(artefact: Artefact, rows: Sequence[int]) -> bool:
    """Whether an artefact has every row that a server needs."""
    return set(rows) <= {row.batch for row in artefact.rows}


def geometric_gain(artefact: Artefact, within: Callable[[int], bool] = lambda _: True) -> float | None:
    """By which factor the artefact's rows are faster than SGLang's own, None where nothing was compared."""
    ratios = []
    for row in artefact.rows:
        compared = compared_times(row)
        if compared is not None and within(row.batch):
            own, ours = compared
            ratios.append(own / ours)
    return statistics.geometric_mean(ratios) if ratios else None


def compared_times(row: RowChoice) -> tuple[float, float] | None:
    """SGLang's own time of a row and ours, in microseconds: the layer's, else both kernels'; None where one lacks."""
    if row.sglang_layer_us is not None and row.layer_us is not None:
        return row.sglang_layer_us, row.layer_us
    up, down, own_up, own_down = row.times
    if up is None or down is None or own_up is None or own_down is None:
        return None
    return own_up + own_down, up + down
