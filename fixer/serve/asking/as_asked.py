"""Put SGLang's own answer in the place of the rules' decision."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fixer.base.errors import SGLangError, StoreError, TuneError
from fixer.base.files import utc_now
from fixer.base.progress import terminal_progress
from fixer.base.status import Phase
from fixer.model.rules.case import Outcome
from fixer.serve.asked import Asked, find, keep
from fixer.serve.asked_question import decision_for, question_of
from fixer.serve.asking.ask import ask
from fixer.serve.log.verdict import down_name
from fixer.serve.options import MoefixOptions

if TYPE_CHECKING:
    from fixer.base.voice import Voice
    from fixer.serve.run import Run
    from fixer.serve.situation import OnCard, Situation


def as_asked(run: Run, situation: Situation, argv: Sequence[str]) -> Situation:
    """The situation with what SGLang asked for, at an earlier start or now, in place of what the rules worked out.

    SGLang names its files after the first card, so it is asked once, and its answer holds for every kind of card.
    """
    asked = _known(run, situation)
    if asked is None and any(_wanted(on.decision.outcome, run.options) for on in situation.kinds):
        asked = _asked_in_turn(run, situation, argv)
    if asked is None:
        return situation
    kinds = (
        _corrected(run, situation, on, asked) if on is situation.first or on.decision.outcome not in UNABLE else on
        for on in situation.kinds
    )
    return replace(situation, kinds=tuple(kinds))


def _corrected(run: Run, situation: Situation, on: OnCard, asked: Asked) -> OnCard:
    try:
        return replace(on, decision=decision_for(situation, on, asked))
    except ValueError as fault:
        run.say.warning(f"{fault}; SGLang's own configuration is served")
        return replace(on, decision=replace(on.decision, outcome=Outcome.NO_LOOKUP, reason=str(fault), workload=None))


def _known(run: Run, situation: Situation) -> Asked | None:
    asked, damaged = find(run.home, question_of(situation, situation.first))
    if damaged is not None:
        run.say.warning(str(damaged))
    fresh = run.options.ask and run.options.fresh
    return None if fresh else asked


UNABLE = (Outcome.NO_MOE, Outcome.LOAD_ERROR, Outcome.ASKS_THEN_CRASHES)
"""Outcomes with which there is nothing to ask."""


def _wanted(outcome: Outcome, options: MoefixOptions) -> bool:
    """Whether SGLang is to be asked. A start that measures nothing does not wait for an answer either."""
    able = outcome not in UNABLE and not options.skip_tune and not options.dry_run
    return able and (options.ask or outcome is Outcome.UNCERTAIN)


def _asked_in_turn(run: Run, situation: Situation, argv: Sequence[str]) -> Asked | None:
    """Ask while nobody measures on the card, or take what another moefix was answered meanwhile.

    Returns:
        None, with a note, where there is no answer.

    Raises:
        SGLangError, TuneError, StoreError: there is none, and --moefix-strict is on.
    """
    from fixer.tuning.turn import turn

    home, say, question = run.home, run.say, question_of(situation, situation.first)
    before, _ = find(home, question)
    try:
        with contextlib.ExitStack() as stack:
            progress = say.follow(stack.enter_context(terminal_progress(quiet=say.quiet)))
            # In one order for all, or two that ask could wait for each other.
            for card in sorted((on.card for on in situation.kinds), key=lambda card: card.sglang_name):
                stack.enter_context(turn(home, card, progress))
            meanwhile, _ = find(home, question)
            if meanwhile not in (None, before):
                return meanwhile
            with _on_board(say):
                return _asked_now(run, situation, argv)
    except (SGLangError, TuneError, StoreError) as fault:
        if run.options.strict:
            raise
        say.warning(f"{fault.message} {fault.hint}".strip() + "; going by moefix's rules")
        return None


@contextlib.contextmanager
def _on_board(say: Voice) -> Iterator[None]:
    if say.board is not None:
        say.board.update(phase=Phase.ASKING, detail="SGLang, which file it looks for")
    try:
        yield
    finally:
        if say.board is not None:
            say.board.update(phase=Phase.STARTING, detail="")


def _asked_now(run: Run, situation: Situation, argv: Sequence[str]) -> Asked:
    """Ask, and keep the answer.

    Raises:
        SGLangError, TuneError: there is none.
    """
    say, home = run.say, run.home
    say.line("asking SGLang itself which MoE file it looks for (dummy weights, few layers) ...")
    began = time.monotonic()
    answer = ask(situation, argv, home)
    took = f"asked in {time.monotonic() - began:.0f} s"
    if answer.gate_up:
        say.line(f"{took}: SGLang looks for {answer.gate_up}" + ("" if len(answer.others) == 0 else " and for others"))
    else:
        say.line(f"{took}: SGLang looks for no MoE file; {answer.ran}")
    down = down_name(answer.gate_up) if answer.gate_up and situation.tree.reads_down_file else ""
    asked = Asked(question_of(situation, situation.first), answer.gate_up, down, "asking", utc_now(), answer.ran)
    try:
        keep(home, asked)
    except StoreError as fault:
        say.warning(fault.message)
    return asked
