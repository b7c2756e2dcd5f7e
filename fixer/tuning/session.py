"""Tune one workload on the cards of one kind: from candidates to an artefact with a verdict for every row."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fixer.artefacts.artefact import LONGEST_NOTE, MOST_NOTES, Artefact, RowChoice
from fixer.artefacts.shelf import earlier_tiles
from fixer.base.data_folder import DataFolder
from fixer.base.errors import TuneError
from fixer.base.files import safe_name, utc_now
from fixer.base.progress import Progress
from fixer.families.fused_moe.arguments import Product
from fixer.kernel.cache import server_triton_cache
from fixer.kernel.compile import Candidate
from fixer.kernel.pool import AdaptiveDeadline, FixedDeadline
from fixer.kernel.space import Space
from fixer.machine.driver import occupancy
from fixer.sglang.tree import Lookup
from fixer.tuning.comparison import LayerComparisons, Question
from fixer.tuning.job import Job, Timeline, Tuned
from fixer.tuning.journal import Journal, JournaledRunner, RunKey
from fixer.tuning.measure.memory import CONTEXTS, LARGEST_L2, full_rotation, layer_room, needed_bytes, with_spare
from fixer.tuning.precompile import server_candidates
from fixer.tuning.row_choice import Finals, alternatives, described_pair
from fixer.tuning.search.runner import Look, look_closer, run_rounds
from fixer.tuning.search.search import Limits, Search
from fixer.tuning.search.seeds import seeds
from fixer.tuning.search.trials import Outcome
from fixer.workload import BOTH, Projection, RowTiles, Tile

if TYPE_CHECKING:
    from fixer.tuning.measure.card_runner import CardRunner


def tune(job: Job, progress: Progress) -> Tuned:
    """Search, warm the server's kernel cache, hold the finals; to be called in one's `turn`.

    Raises:
        MoefixError: measuring failed as a whole; what was measured is in the journal.
    """
    return _Session(job, progress).run()


class _Session:
    """One tuning run."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._timeline = Timeline()
        self._notes: list[str] = []
        self._warmed: set[Candidate] = set()
        self._target = job.target
        # What SGLang would run if moefix had never installed anything.
        self._family = job.family
        self._lookup: Lookup = self._family.lookup(job.tree, job.workload, job.card, without_moefix=True)
        choose = self._family.own_choices(job.tree, self._lookup, job.workload, job.card)
        self._own = {tokens: choose(tokens).tiles for tokens in job.rows}

    def run(self) -> Tuned:
        job = self._job
        with ExitStack() as stack:
            journal = Journal(DataFolder(job.home).journal, RunKey(job.environment, job.workload))
            stack.callback(journal.close)
            self._notes += journal.notes
            if job.fresh:
                journal.forget()
            runner = stack.enter_context(self._card_runner())
            layer = self._start_layer(stack)
            journaled = JournaledRunner(runner, journal)
            search = self._search()
            looks = self._run_rounds(search, journaled)
            busy = ", ".join(f"{seconds:.1f} s" for seconds in runner.busy_seconds)
            self._progress.note(f"of the search the card was busy for {busy}; the rest it waited for the compiler")
            self._warm(runner, search)
            look_closer(search, journaled)
            self._timeline.mark("closer looks")
            self._warm(runner, search)
            for _ in runner.finish_compiling():
                self._progress.advance()
            self._timeline.mark("compiling for the server")
            rows = self._finals(search, runner, layer, looks)
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
            files=self._lookup.names,
            rows=rows,
            created=utc_now(),
            seconds=round(self._timeline.total, 1),
            measured=True,
            notes=tuple(note[:LONGEST_NOTE] for note in self._notes if note.startswith("M="))[:MOST_NOTES],
        )
        return Tuned(
            artefact, tuple(looks.values()), timings, journaled.resumed, self._timeline.seconds, tuple(self._notes)
        )

    # ---- search

    def _card_runner(self) -> CardRunner:
        from fixer.tuning.measure.card_runner import CardRunner

        if importlib.util.find_spec("torch") is None:
            raise TuneError("Measuring needs PyTorch, and it is not installed.", "Use SGLang's Python.")
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
            descriptors=self._descriptors,
        )

    @property
    def _joint(self) -> bool:
        """Whether this release reads one file for both projections."""
        return not self._job.tree.reads_down_file

    @cached_property
    def _descriptors(self) -> frozenset[Projection]:
        """What may load through tensor descriptors; only SGLang's own layer can say what that is worth in all."""
        job = self._job
        if job.layer_package is None:
            return frozenset()
        return self._family.descriptors(job.tree, job.workload, job.card)

    @property
    def _scratch(self) -> Path:
        """Triton's cache folder for candidates; a resumed run finds there what was compiled before it was killed."""
        return DataFolder(self._job.home).cache / "triton-search" / safe_name(self._job.card.sglang_name)

    @property
    def _own_tiles(self) -> list[Tile]:
        """SGLang's own configurations of all rows, each once."""
        return list(dict.fromkeys(tile for pair in self._own.values() for tile in pair.tiles))

    def _search(self) -> Search:
        job = self._job
        own = self._own_tiles
        if job.exhaustive:
            everything = tuple(Space(job.workload).all())
            limits = Limits(seeds=2 * len(everything), kernels=2 * (len(everything) + len(own)))
            return Search(job.workload, job.rows, everything, own, limits, joint=self._joint)
        earlier = earlier_tiles(job.home, job.workload)
        first = seeds(self._family.shipped_files(job.tree), job.workload, job.card, earlier)
        return Search(job.workload, job.rows, first, own, descriptors=self._descriptors, joint=self._joint)

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

    def _contenders(self, search: Search) -> list[dict[int, RowTiles]]:
        """What the finals will compare with SGLang's own: the best pairs, and the best with tensor descriptors."""
        plain, described = {}, {}
        for tokens in self._job.rows:
            pairs = alternatives(search, tokens)
            if not pairs:
                raise TuneError(
                    f"Not one configuration could be timed for M={tokens}.",
                    "The data folder's journal.sqlite says why; to serve without tuning: --moefix-skip-tune.",
                )
            plain[tokens] = pairs[0]
            described[tokens] = described_pair(search, tokens) or pairs[0]
        return [plain, described]

    # ---- what the server will compile

    def _warm(self, runner: CardRunner, search: Search) -> None:
        """Have all sides of each comparison compiled, so that any verdict finds its kernels in the server's cache."""
        job, sides = self._job, [*self._contenders(search), self._own]
        candidates = [one for rows in sides for one in server_candidates(job.workload, rows, job.rows[-1])]
        fresh = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self._warmed]
        self._warmed.update(fresh)
        runner.compile_ahead(fresh, server_triton_cache())
        # What the finals load; after a resumed run's start it may be in no cache any more.
        tiles = [pair.kernels for rows in sides for pair in rows.values() if not pair.use_tma]
        finals = {Candidate(job.workload, kernel.projection, kernel.tile) for kernels in tiles for kernel in kernels}
        runner.compile_ahead(sorted(finals - self._warmed, key=str), self._scratch)
        self._warmed.update(finals)
        self._progress.phase("compiling for the server", runner.to_compile)

    # ---- finals

    def _start_layer(self, stack: ExitStack) -> LayerComparisons | None:
        """Begin to import SGLang now; it takes about as long as the search."""
        job = self._job
        if job.layer_package is None or not self._has_room_for_layer():
            return None
        question = Question(job.layer_package, job.workload, job.card.index or 0, job.rows[-1], server_triton_cache())
        child = question.start()
        stack.callback(child.close)
        return LayerComparisons(child, question, self._notes.append)

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
        self, search: Search, runner: CardRunner, layer: LayerComparisons | None, looks: Mapping[object, Look]
    ) -> tuple[RowChoice, ...]:
        """A verdict for every row."""
        self._progress.phase("finals", len(self._job.rows))
        finals = Finals(self._own, search, runner, layer, self._notes.append)
        rows = []
        for tokens in self._job.rows:
            rows.append(finals.row(tokens, own_runs=self._runs(self._own[tokens], looks)))
            self._progress.advance(f"M={tokens}")
        if layer is not None and layer.why_missing:
            self._notes.append(f"the finals ran on the bare kernels, not through SGLang's layer: {layer.why_missing}")
        return tuple(rows)

    @staticmethod
    def _runs(pair: RowTiles, looks: Mapping[object, Look]) -> bool:
        """Whether SGLang's own pair runs on this card; a TMA tile is not tried by the search and has its duel."""
        known = [looks[kernel] for kernel in pair.kernels if kernel in looks]
        return all(look.build.outcome is Outcome.OK for look in known)
