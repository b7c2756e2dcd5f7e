"""Measure on cards: compiling processes feed one measuring process a card.

Compiling and timing overlap; a kernel that is compiled waits for the card only while the card is busy with another.
With several cards of a kind each has its share of the rows, so that a row's candidates are compared on one card.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from fixer.base.errors import TuneError
from fixer.kernel.cache import server_triton_cache
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target
from fixer.kernel.pool import AdaptiveDeadline, CompilePool, Deadline
from fixer.machine.processes import usable_cores
from fixer.machine.worker import ChildProcess, Fate, Handler
from fixer.tuning.duel import DuelRequest, KernelDuel
from fixer.tuning.measure.requests import LookAt, Setup, TimeCloser, measuring_handler
from fixer.tuning.search.runner import Look, More, Request
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, Tile, Workload

SENT_AHEAD = 2
"""Requests that a measuring process has at a time, so that it never waits for this one between two kernels."""

LOOK_SECONDS = 30.0
"""A kernel that keeps the card busy for longer hangs, or is of no use."""

EARLY_ROUND = 0.6
"""The next round is asked for when nothing waits to be compiled and this share of all so far is answered."""

MOST_FAULTS = 12
"""So many measuring processes lost in a row, without an answer in between: the card is at fault, not the kernels."""

AHEAD_SECONDS = 120.0
"""Seconds: a kernel that the server will launch is compiled to its end, however slow its compilation is."""

OUTCOMES = {
    CompileOutcome.FAILED: Outcome.COMPILE_ERROR,
    CompileOutcome.DEADLINE: Outcome.COMPILE_DEADLINE,
    CompileOutcome.CRASHED: Outcome.CRASHED,
}
FATES = {Fate.CRASHED: Outcome.CRASHED, Fate.TIMED_OUT: Outcome.TIMED_OUT}


@dataclass
class _Card:
    """One card's measuring process, what it was sent (it works on the first), and what waits for it."""

    child: ChildProcess
    rows: frozenset[int]
    waiting: deque[Request] = field(default_factory=deque)
    sent: deque[Request] = field(default_factory=deque)
    since: float = 0.0
    busy_seconds: float = 0.0


@dataclass
class _Answer:
    """A request's parts as they come in from the cards."""

    build: Build
    missing: int
    timings: list[Timing] = field(default_factory=list)


def compiling_cores() -> int:
    """Cores for compiling: all but two where there are many, for the measuring process and SGLang's import."""
    cores = usable_cores()
    return cores - 2 if cores >= 8 else cores


class CardRunner:
    """The `Runner` with cards behind it.

    Args:
        workload: the layer.
        target: SGLang's kernel and the cards' architecture.
        devices: CUDA's indices of the cards to use, all of one kind.
        rows: every M that may be asked for.
        patient: tiles that are compiled to their end, however long it takes (SGLang's own: the finals need them).
        deadline: how long the others may take to compile.
        factory: builds the measuring process's handler.
        shared_limit: bytes of shared memory a block may use.
        folder: where compiled candidates are kept while the search lasts.
        descriptors: the projections that may load through tensor descriptors.
        workers: compiling processes; None for about one a core.
    """

    def __init__(
        self,
        workload: Workload,
        target: Target,
        *,
        devices: Sequence[int],
        rows: Sequence[int],
        shared_limit: int,
        folder: Path,
        patient: Collection[Tile] = (),
        deadline: Deadline | None = None,
        workers: int | None = None,
        descriptors: frozenset[Projection] = frozenset(),
        factory: Callable[[Setup], Handler] = measuring_handler,
    ) -> None:
        self._workload = workload
        self._limit = shared_limit
        self._patient = frozenset(patient)
        self._pool = CompilePool(target, folder, workers or compiling_cores(), deadline or AdaptiveDeadline())
        setup = Setup(
            workload, target, folder, server_triton_cache(), devices[0], tuple(rows), shared_limit, descriptors
        )
        self._cards = [
            _Card(
                ChildProcess(partial(factory, replace(setup, device=device))),
                frozenset(rows[position :: len(devices)]),
            )
            for position, device in enumerate(devices)
        ]
        self._best: dict[tuple[Projection, int], float] = defaultdict(lambda: float("inf"))
        self._faults = 0
        for card in self._cards:
            card.child.start()

    def __enter__(self) -> CardRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.close()
        for card in self._cards:
            card.child.close()

    @property
    def restarts(self) -> int:
        """How often a measuring process had to be started anew."""
        return sum(max(0, card.child.restarts) for card in self._cards)

    def look(self, requests: Sequence[Request], more: More | None = None) -> Iterator[Look]:
        """Compile and look; see `Runner.look`."""
        wanted: dict[Candidate, Request] = {}
        answers: dict[Kernel, _Answer] = {}
        answered = 0
        self._submit(requests, wanted)
        while self._pool.busy or answers:
            for candidate, compiled in self._pool.poll():
                request = wanted[candidate]
                build = self._judge(request.kernel, compiled)
                if build.outcome is Outcome.OK:
                    answers[request.kernel] = _Answer(build, self._hand_out(request))
                else:
                    answered += 1
                    yield Look(build)
            self._send_waiting()
            for look in self._receive(answers):
                answered += 1
                yield look
            if more is not None and not self._pool.waiting and answered >= EARLY_ROUND * len(wanted):
                further = more()
                self._submit(further, wanted)
                more = more if further else None

    def _submit(self, requests: Sequence[Request], wanted: dict[Candidate, Request]) -> None:
        """Have kernels compiled, SGLang's own first and to their end."""
        fresh = {self._candidate(request.kernel): request for request in requests}
        wanted.update(fresh)
        self._pool.submit((c for c in fresh if c.tile in self._patient), seconds=AHEAD_SECONDS)
        self._pool.submit(c for c in fresh if c.tile not in self._patient)

    def _candidate(self, kernel: Kernel) -> Candidate:
        return Candidate(self._workload, kernel.projection, kernel.tile)

    def _judge(self, kernel: Kernel, compiled: Compiled) -> Build:
        outcome = OUTCOMES.get(compiled.outcome, Outcome.OK)
        if outcome is Outcome.OK and compiled.shared_bytes > self._limit:
            outcome = Outcome.TOO_MUCH_SHARED_MEMORY
        return Build(
            kernel,
            outcome,
            compiled.shared_bytes,
            compile_seconds=compiled.seconds,
            message=compiled.message,
        )

    def _hand_out(self, request: Request) -> int:
        """Queue a request's rows at the cards that have them; how many cards that is."""
        shares = 0
        for card in self._cards:
            rows = tuple(tokens for tokens in request.rows if tokens in card.rows)
            if rows or (not request.rows and card is self._cards[0]):
                card.waiting.append(Request(request.kernel, rows))
                shares += 1
        return shares

    def _send_waiting(self) -> None:
        for card in self._cards:
            while len(card.sent) < SENT_AHEAD and card.waiting and card.child.is_ready():
                request = card.waiting.popleft()
                if not card.sent:
                    card.since = time.monotonic()
                card.sent.append(request)
                best = {tokens: self._best[request.kernel.projection, tokens] for tokens in request.rows}
                card.child.send(LookAt(request.kernel, request.rows, best))

    def _receive(self, answers: dict[Kernel, _Answer]) -> Iterator[Look]:
        """Wait for a card's answer or a compiled kernel, and give back the requests that are now complete."""
        cards = [card.child.connection for card in self._cards if card.sent or card.waiting]
        ready = wait([*self._pool.connections, *cards], timeout=0.25)  # deadlines are looked after in between
        for card in self._cards:
            if not card.sent:
                continue
            if card.child.connection not in ready and time.monotonic() - card.since < LOOK_SECONDS:
                continue
            request, part, now = card.sent.popleft(), card.child.receive(0.0), time.monotonic()
            card.busy_seconds += now - card.since
            card.since = now
            if isinstance(part, Fate):  # it was at this one: the others have not been begun
                card.waiting.extendleft(reversed(card.sent))
                card.sent.clear()
            answer = answers[request.kernel]
            answer.missing -= 1
            self._merge(answer, part)
            if answer.missing == 0:
                del answers[request.kernel]
                runs = answer.build.outcome is Outcome.OK  # what failed on one card is not chosen for another's times
                yield Look(answer.build, tuple(answer.timings) if runs else ())

    def _merge(self, answer: _Answer, part: Look | Fate) -> None:
        if isinstance(part, Fate):
            self._faults += 1
            if self._faults >= MOST_FAULTS:
                raise TuneError(
                    f"The measuring process was lost {self._faults} times in a row; it last {part.value}.",
                    "See the lines above and nvidia-smi; once the card is well, `moefix tune --fresh` starts over.",
                )
            answer.build = replace(answer.build, outcome=FATES[part])
            return
        self._faults = 0
        if answer.build.outcome is Outcome.OK:
            answer.build = replace(part.build, compile_seconds=answer.build.compile_seconds)
        answer.timings += part.timings
        for timing in part.timings:
            key = (timing.kernel.projection, timing.tokens)
            self._best[key] = min(self._best[key], timing.microseconds)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """How long each card has looked at kernels; the rest of a search it waited for the compiler."""
        return tuple(card.busy_seconds for card in self._cards)

    def compile_ahead(self, candidates: Sequence[Candidate], cache: Path) -> None:
        """Have candidates compiled into another cache folder while the cards are busy; call after the last look."""
        self._pool.submit(candidates, cache, AHEAD_SECONDS)

    def finish_compiling(self) -> Iterator[None]:
        """Wait for what was to be compiled ahead, a step at a time."""
        for _ in self._pool.drain():
            yield

    @property
    def to_compile(self) -> int:
        """How many candidates are not compiled yet."""
        return self._pool.busy

    def duel(self, request: DuelRequest) -> KernelDuel | None:
        """Time two pairs in turn on the first card, kernel by kernel; None where it died over it or a kernel fails."""
        answer = self._cards[0].child.ask(request, LOOK_SECONDS)
        return answer if isinstance(answer, KernelDuel) else None

    def closer(self, wanted: Iterable[tuple[Kernel, int]], replays: int) -> Iterator[Timing]:
        """Time again, with more replays, a row's kernels in turn; see `Runner.closer`."""
        by_row: dict[int, list[Kernel]] = defaultdict(list)
        for kernel, tokens in wanted:
            by_row[tokens].append(kernel)
        queues = [
            deque(TimeCloser(tuple(by_row[tokens]), tokens, replays) for tokens in by_row if tokens in card.rows)
            for card in self._cards
        ]
        while any(queues):
            self._pool.poll()  # what is compiled ahead goes on
            busy = [(card, queue, queue.popleft()) for card, queue in zip(self._cards, queues, strict=True) if queue]
            for card, _, request in busy:
                card.child.send(request)
            for card, queue, request in busy:
                answer = card.child.receive(LOOK_SECONDS)
                if not isinstance(answer, Fate):
                    yield from answer
                elif len(request.kernels) > 1:  # one of them is at fault, and the others are not
                    queue.extend(replace(request, kernels=(kernel,)) for kernel in request.kernels)
