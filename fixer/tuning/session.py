"""Tune one workload on the cards of one kind: from candidates to an artefact with a verdict for every row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fixer.artefacts.artefact import Artefact, Decision, RowChoice
from fixer.artefacts.shelf import earlier_tiles
from fixer.base.errors import MoefixError, SGLangError, TuneError
from fixer.base.files import safe_name, utc_now
from fixer.base.progress import Progress
from fixer.kernel.arguments import Product
from fixer.kernel.cache import server_triton_cache
from fixer.kernel.compile import Candidate
from fixer.kernel.pool import AdaptiveDeadline, FixedDeadline
from fixer.kernel.space import Space
from fixer.machine.driver import occupancy
from fixer.machine.worker import ChildProcess, Fate, Handler
from fixer.sglang.own_choices import own_choices
from fixer.sglang.tree import Lookup
from fixer.tuning.duel import LEAST_GAIN, Duel, DuelRequest, KernelDuel
from fixer.tuning.job import Job, Timeline, Tuned
from fixer.tuning.journal import Journal, JournaledRunner, RunKey
from fixer.tuning.measure.memory import CONTEXTS, LARGEST_L2, full_rotation, layer_room, needed_bytes, with_spare
from fixer.tuning.precompile import server_candidates
from fixer.tuning.row_choice import row_choice
from fixer.tuning.search.runner import Look, look_closer, run_rounds
from fixer.tuning.search.search import Limits, Search
from fixer.tuning.search.seeds import seeds
from fixer.tuning.search.trials import Outcome
from fixer.workload import BOTH, Projection, Tile, TilePair, Workload

if TYPE_CHECKING:
    from fixer.tuning.measure.card_runner import CardRunner

DUEL_SECONDS = 60.0
"""A row's duel may take this long; the first one may build SGLang's own CUDA kernels (see LAYER_START_SECONDS)."""

EXTRA_DUELS = 2
"""How often a row that is too close to call is timed again."""


LAYER_START_SECONDS = 90.0
"""How long the finals wait for SGLang to be imported before they go on without its layer."""


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
