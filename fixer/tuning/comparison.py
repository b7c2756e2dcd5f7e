"""Comparisons through SGLang's own layer that are settled: one that fails is tried again, and whose fault it is found.

A failure says little by itself. A fault of the measuring process (a spoiled CUDA context, a card that was full for a
moment) goes with the process, so that it is started anew and the row tried again. A pair that fails twice is at fault,
and is never installed. What failed at one M says nothing of the others.

As a program it runs one comparison again: `python -m fixer.tuning.comparison JSON` (see `Question.command`).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from fixer.base.errors import MoefixError
from fixer.machine.worker import ChildProcess, Fate, Handler
from fixer.tuning.duel import Duel, DuelRequest, PairError
from fixer.workload import NumberFormat, RowTiles, Tile, Workload

COMPARISON_SECONDS = 60.0
"""How long a row may take; the first one may still build SGLang's own CUDA kernels."""

START_SECONDS = 90.0
"""How long the first comparison waits for SGLang to be imported."""

MOST_RESTARTS = 16
"""So many processes lost: the card or the layer is at fault, and what is left is not tried."""

TRIES = 2
"""A pair that fails this often is at fault."""


@dataclass(frozen=True)
class Question:
    """All that a comparison depends on, so that a user can see a fault again.

    Attributes:
        package: SGLang's package folder.
        most_tokens: the largest M of the ladder: it sets the size of the buffers.
        cache: Triton's cache folder.
    """

    package: Path
    workload: Workload
    device: int
    most_tokens: int
    cache: Path

    def command(self, request: DuelRequest) -> str:
        """A command line that runs this comparison alone and prints what it comes to."""
        pairs = [[pair.gate_up.to_json(), pair.down.to_json()] for pair in request.pairs]
        layer = asdict(self.workload) | {"number_format": self.workload.number_format.value}
        text = json.dumps(
            {
                "package": str(self.package),
                "workload": layer,
                "device": self.device,
                "most_tokens": self.most_tokens,
                "cache": str(self.cache),
                "tokens": request.tokens,
                "pairs": pairs,
            }
        )
        return shlex.join([Path(sys.executable).name, "-m", MODULE, text])

    def start(self) -> ChildProcess:
        """The process that has SGLang's layer; it starts to import now."""
        place = (self.package, self.workload, self.device, self.most_tokens, self.cache)
        child = ChildProcess(partial(build_layer, *place), START_SECONDS)
        child.start()
        return child


MODULE = __name__


def build_layer(package: Path, workload: Workload, device: int, most_tokens: int, cache: Path) -> Handler:
    """What answers comparisons through SGLang's own layer; runs in a child process (`ChildProcess`).

    Args:
        package, workload, device, most_tokens, cache: as for `Question`.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from fixer.tuning.measure.layer_bench import LayerSetup, layer_handler

    return layer_handler(LayerSetup(package, workload, device, most_tokens))


@dataclass(frozen=True)
class Settled:
    """What a comparison came to.

    Attributes:
        duel: the times; None where a pair is at fault and nothing could be timed, or the layer is not there at all.
        faults: the error of each pair that failed twice.
    """

    duel: Duel | None = None
    faults: Mapping[RowTiles, str] = field(default_factory=dict)


class LayerComparisons:
    """Asks the process that has SGLang's layer, and finds out who is at fault where it fails.

    Args:
        child: the process, already started.
        question: what it was started with; None leaves out the command from the notes.
        note: called with every line that a user should read.
    """

    def __init__(self, child: ChildProcess, question: Question | None, note: Callable[[str], None]) -> None:
        self._child = child
        self._question = question
        self._note = note
        self._missing = ""
        self._has_answered = False

    @property
    def why_missing(self) -> str:
        """Why there is no layer at all, "" while there is one: it could not be imported or built here."""
        return self._missing

    def settle(self, request: DuelRequest) -> Settled:
        """Compare two pairs for one row, or find out which of them fails."""
        first = self._ask(request)
        if isinstance(first, Duel):
            return Settled(first)
        if self._missing:
            return Settled()
        second = self._ask(request)
        if isinstance(second, Duel):
            self._note(f"M={request.tokens}: a comparison failed once and not again ({first.message})")
            return Settled(second)
        named = first.pair if first.pair == second.pair else None
        alone = {pair: second.message if pair == named else self._alone(request, pair) for pair in request.pairs}
        faults = {pair: answer for pair, answer in alone.items() if isinstance(answer, str)}
        self._report(request, faults, second.message)
        tuned = alone[request.tuned]
        is_only_one = request.own is None or request.own in faults
        return Settled(tuned if is_only_one and isinstance(tuned, Duel) else None, faults)

    def _alone(self, request: DuelRequest, pair: RowTiles) -> Duel | str:
        """One pair by itself: its times, or its error where it fails twice."""
        error = ""
        for _ in range(TRIES):
            answer = self._ask(replace(request, own=None, tuned=pair))
            if isinstance(answer, Duel):
                return answer
            error = answer.message
        return error

    def _report(self, request: DuelRequest, faults: Mapping[RowTiles, str], last: str) -> None:
        where = f"M={request.tokens}: SGLang's own layer failed"
        again = "" if self._question is None else f"; to see it again: {self._question.command(request)}"
        if not faults:
            self._note(f"{where} twice with two configurations in turn, and with neither alone ({last}){again}")
        elif len(faults) == len(request.pairs) > 1:
            self._note(f"{where} with every configuration tried, SGLang's own too ({last}){again}")
        else:
            for pair, error in faults.items():
                whose = "SGLang's own configuration" if pair == request.own else "a tuned one"
                self._note(f"{where} twice with {whose}, {pair} ({error}){again}")

    def _ask(self, request: DuelRequest) -> Duel | PairError:
        """One try; after a failure the next one has a process of its own."""
        if self._child.restarts >= MOST_RESTARTS:
            return PairError(None, f"the measuring process was lost {MOST_RESTARTS} times")
        try:
            self._child.wait_ready()
        except MoefixError as error:
            if not self._has_answered:
                self._missing = error.message
            return PairError(None, error.message)
        self._has_answered = True
        try:
            answer = self._child.ask(request, COMPARISON_SECONDS)
        except MoefixError as error:
            self._child.close()  # its CUDA context may be spoiled
            return error if isinstance(error, PairError) else PairError(None, error.message)
        if isinstance(answer, Fate):
            return PairError(None, f"the measuring process {answer.value}")
        assert isinstance(answer, Duel)
        return answer


# --- to see a fault again --------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run the comparison that a JSON text describes; its result on standard output, 1 where it fails."""
    content = json.loads(argv[0])
    layer = content["workload"]
    layer["number_format"] = NumberFormat(layer["number_format"])
    layer["block_shape"] = layer["block_shape"] and tuple(layer["block_shape"])
    question = Question(
        Path(content["package"]), Workload(**layer), content["device"], content["most_tokens"], Path(content["cache"])
    )
    pairs = [RowTiles(*map(Tile.from_json, pair)) for pair in content["pairs"]]
    request = DuelRequest(content["tokens"], pairs[0] if len(pairs) > 1 else None, pairs[-1])
    child = question.start()
    try:
        answer = child.ask(request, 4 * COMPARISON_SECONDS)
    except MoefixError as error:
        print(error.message)
        return 1
    finally:
        child.close()
    if isinstance(answer, Fate):
        print(f"the measuring process {answer.value}")
        return 1
    for pair, times in zip(request.pairs, [answer.own, answer.tuned] if answer.own else [answer.tuned], strict=True):
        print(f"M={request.tokens} {pair}: {sorted(times)[len(times) // 2]:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
