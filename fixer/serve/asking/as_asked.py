"""Put SGLang's own answer in the place of the rules' decision."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fixer.base.errors import SGLangError, StoreError, TuneError
from fixer.base.files import utc_now
from fixer.base.progress import terminal_progress
from fixer.base.status import Phase
from fixer.model.rules.case import Decision, Outcome
from fixer.serve.asked import Asked, find, keep
from fixer.serve.asked_question import decision_for, question_of
from fixer.serve.asking.ask import ask
from fixer.serve.log.verdict import down_name
from fixer.serve.options import MoefixOptions

if TYPE_CHECKING:
    from fixer.base.voice import Voice
    from fixer.serve.situation import Situation


def as_asked(situation: Situation, argv: Sequence[str], options: MoefixOptions, home: Path, say: Voice) -> Situation:
    """The situation with what SGLang asked for, at an earlier start or now, in place of what the rules worked out.

    SGLang names its files after the first card, so it is asked once, and its answer holds for every kind of card.
    """
    asked = _known(situation, options, home, say)
    if asked is None and any(_wanted(decision.outcome, options) for decision in situation.decisions):
        asked = _asked_in_turn(situation, argv, home, say, strict=options.strict)
    if asked is None:
        return situation
    decisions = (
        _corrected(situation, kind, asked, say) if kind == 0 or decision.outcome not in UNABLE else decision
        for kind, decision in enumerate(situation.decisions)
    )
    return replace(situation, decisions=tuple(decisions))


def _corrected(situation: Situation, kind: int, asked: Asked, say: Voice) -> Decision:
    try:
        return decision_for(situation, kind, asked)
    except ValueError as fault:
        say.warning(f"{fault}; SGLang's own configuration is served")
        return replace(situation.decisions[kind], outcome=Outcome.NO_LOOKUP, reason=str(fault), workload=None)


def _known(situation: Situation, options: MoefixOptions, home: Path, say: Voice) -> Asked | None:
    asked, damaged = find(home, question_of(situation, 0))
    if damaged is not None:
        say.warning(str(damaged))
    fresh = options.ask and options.fresh
    return None if fresh else asked


UNABLE = (Outcome.NO_MOE, Outcome.LOAD_ERROR, Outcome.ASKS_THEN_CRASHES)
"""Outcomes with which there is nothing to ask."""


def _wanted(outcome: Outcome, options: MoefixOptions) -> bool:
    """Whether SGLang is to be asked. A start that measures nothing does not wait for an answer either."""
    able = outcome not in UNABLE and not options.skip_tune and not options.dry_run
    return able and (options.ask or outcome is Outcome.UNCERTAIN)


def _asked_in_turn(situation: Situation, argv: Sequence[str], home: Path, say: Voice, *, strict: bool) -> Asked | None:
    """Ask while nobody measures on the card, or take what another moefix was answered meanwhile.

    Returns:
        None, with a note, where there is no answer.

    Raises:
        SGLangError, TuneError, StoreError: there is none, and `strict`.
    """
    from fixer.tuning.turn import turn

    question = question_of(situation, 0)
    before, _ = find(home, question)
    try:
        with contextlib.ExitStack() as stack:
            progress = say.follow(stack.enter_context(terminal_progress(quiet=say.quiet)))
            # In one order for all, or two that ask could wait for each other.
            for card in sorted((cards[0] for cards in situation.cards), key=lambda card: card.sglang_name):
                stack.enter_context(turn(home, card, progress))
            meanwhile, _ = find(home, question)
            if meanwhile not in (None, before):
                return meanwhile
            with _on_board(say):
                return _asked_now(situation, argv, home, say)
    except (SGLangError, TuneError, StoreError) as fault:
        if strict:
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


def _asked_now(situation: Situation, argv: Sequence[str], home: Path, say: Voice) -> Asked:
    """Ask, and keep the answer.

    Raises:
        SGLangError, TuneError: there is none.
    """
    say.line("asking SGLang itself which MoE file it looks for (dummy weights, few layers) ...")
    began = time.monotonic()
    answer = ask(situation, argv, home)
    took = f"asked in {time.monotonic() - began:.0f} s"
    if answer.gate_up:
        say.line(f"{took}: SGLang looks for {answer.gate_up}" + ("" if len(answer.others) == 0 else " and for others"))
    else:
        say.line(f"{took}: SGLang looks for no MoE file; {answer.ran}")
    down = down_name(answer.gate_up) if answer.gate_up and situation.tree.reads_down_file else ""
    asked = Asked(question_of(situation, 0), answer.gate_up, down, "asking", utc_now(), answer.ran)
    try:
        keep(home, asked)
    except StoreError as fault:
        say.warning(fault.message)
    return asked
