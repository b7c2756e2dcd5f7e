"""SGLang's own configuration against the tuned one in SGLang's MoE layer, row by row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from fixer.base.errors import MoefixError, SGLangError, TuneError
from fixer.base.progress import Progress
from fixer.bench.results import BenchResult, Kind
from fixer.bench.subject import Subject
from fixer.bench.verdict import judged_row, overall_rows
from fixer.machine.worker import ChildProcess, Factory, Fate
from fixer.serve.find_or_tune import importable_package
from fixer.sglang.server import OUT_OF_SHARED_MEMORY
from fixer.tuning.duel import Duel, DuelRequest
from fixer.workload import RowTiles

DEFAULT_ROUNDS = 3
"""Each captures its graphs anew, on other memory, with the sides in the other order."""

Publish = Callable[[BenchResult], None]
"""Called with every state of a result that is worth keeping; the last is complete."""


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
        self._tuned = {batch: subject.tuned_pair(batch) for batch in subject.rows}
        self._own: dict[int, RowTiles | None] = {batch: subject.own_pair(batch) for batch in subject.rows}
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
    ratio, interval, verdict = overall_rows(rows)
    return replace(result, rows=rows, ratio=ratio, interval=interval, verdict=verdict, complete=complete)
