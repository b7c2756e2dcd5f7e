"""SGLang's own answer in the place of the rules' decision: before tuning where the rules are not sure, else beside it.

SGLang's classes are asked in a process of their own (`fixer.model.asking`): 8 to 12 s, no card, no server. Where the
rules know the layer, tuning begins at once and the answer is compared when both are done, so that it costs no time;
where it differs, it wins, and the right layer is tuned in the same start. An answer is kept, so it is asked for once.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fixer.base.data_folder import DataFolder
from fixer.base.errors import SGLangError, StoreError
from fixer.base.files import utc_now
from fixer.base.status import Phase
from fixer.model.config import Source
from fixer.model.hub import hub_cache, snapshot_folder
from fixer.model.rules.case import Outcome
from fixer.serve.asked import Asked, find, keep
from fixer.serve.asked_question import decision_for, question_of
from fixer.serve.find_or_tune import importable_package

if TYPE_CHECKING:
    from fixer.model.asking.answer import Answer
    from fixer.model.asking.ask import Question
    from fixer.model.config import Model
    from fixer.serve.run import Run
    from fixer.serve.situation import OnCard, Situation

UNABLE = (Outcome.NO_MOE, Outcome.ASKS_THEN_CRASHES)
"""Outcomes with which there is nothing to ask."""


class Asking:
    """One question to SGLang, put at most once, and answered in the background.

    Args:
        run: this start.
        situation: the model on this machine, by the rules.
        argv: the user's SGLang flags.
    """

    def __init__(self, run: Run, situation: Situation, argv: Sequence[str]) -> None:
        self._run, self._situation, self._argv = run, situation, argv
        self._thread: threading.Thread | None = None
        self._answer: Answer | None = None
        self._known = _known(run, situation)

    def before_tuning(self) -> Situation:
        """The situation to tune for: with what is on record, or asked now where the rules are not sure."""
        situation, options = self._situation, self._run.options
        if self._known is not None:
            return with_asked(self._run, situation, self._known)
        measures = not options.skip_tune and not options.dry_run
        unsure = any(on.decision.outcome is Outcome.UNCERTAIN for on in situation.kinds)
        if measures and (options.ask or unsure):
            self._say_phase(Phase.ASKING, "SGLang, which file it looks for")
            try:
                return self._answered()
            finally:
                self._say_phase(Phase.STARTING, "")
        return situation

    def begin(self) -> None:
        """Ask in the background, as tuning begins; nothing where it was asked before, or cannot be asked."""
        here = importable_package(self._situation) is not None and _model_folder(self._situation.model) is not None
        if here and self._thread is None and self._known is None:
            self._thread = threading.Thread(target=self._ask, name="moefix-asking", daemon=True)
            self._thread.start()

    def after_tuning(self) -> Situation | None:
        """The situation by SGLang's answer, where that differs in a layer from what was tuned; None where it agrees."""
        if self._thread is None:
            return None
        before, now = self._situation, self._answered()
        same = all(
            was.decision.workload == on.decision.workload for was, on in zip(before.kinds, now.kinds, strict=True)
        )
        if same:
            return None
        self._run.say.warning("SGLang itself looks for another file than moefix's rules say; its word counts")
        return now

    def _ask(self) -> None:
        from fixer.model.asking.answer import not_known
        from fixer.model.asking.ask import ask

        try:
            self._answer = ask(_question(self._situation, self._argv), folder=DataFolder(self._run.home).asking)
        except Exception as fault:  # in a thread: what nobody foresaw is no answer, and never a stop
            self._answer = not_known(f"{type(fault).__name__}: {fault}"[:300])

    def _answered(self) -> Situation:
        """Wait for the answer, keep it, and put it in the place of the rules' decisions.

        Raises:
            SGLangError: there is none, and the user wants it (--moefix-ask with --moefix-strict).
        """
        from fixer.model.asking.answer import Outcome as Said

        run, situation = self._run, self._situation
        self.begin()
        if self._thread is None:
            return situation
        self._thread.join()
        assert self._answer is not None
        answer = self._answer
        if answer.outcome is Said.NOT_KNOWN:
            if run.options.ask and run.options.strict:
                raise SGLangError(f"SGLang could not be asked: {answer.reason}.")
            run.say.line(f"SGLang could not be asked ({answer.reason[:200]}); going by moefix's rules")
            return situation
        if answer.outcome is Said.LOAD_ERROR:
            run.say.warning(f"SGLang itself refuses this model with these flags: {answer.reason}")
            return with_refusal(situation, answer.reason)
        asked = asked_of(situation, answer)
        run.say.line(
            f"SGLang, when asked, looks for {asked.gate_up}"
            if asked.gate_up
            else f"SGLang, when asked, looks for no MoE file{': ' + asked.ran if asked.ran else ''}"
        )
        try:
            keep(run.home, asked)
        except StoreError as fault:
            run.say.warning(fault.message)
        return with_asked(run, situation, asked)

    def _say_phase(self, phase: Phase, detail: str) -> None:
        if self._run.say.board is not None:
            self._run.say.board.update(phase=phase, detail=detail)


def _known(run: Run, situation: Situation) -> Asked | None:
    """What is on record of this question, unless it is to be asked anew; a damaged record is reported."""
    asked, damaged = find(run.home, question_of(situation, situation.first))
    if damaged is not None:
        run.say.warning(str(damaged))
    return None if run.options.ask and run.options.fresh else asked


def with_asked(run: Run, situation: Situation, asked: Asked) -> Situation:
    """The situation with what SGLang asked for. Its names are after the first card, and hold for every kind."""

    def corrected(on: OnCard) -> OnCard:
        if on is not situation.first and on.decision.outcome in UNABLE:
            return on
        try:
            return replace(on, decision=decision_for(situation, on, asked))
        except ValueError as fault:
            run.say.warning(f"{fault}; SGLang's own configuration is served")
            nothing = replace(on.decision, outcome=Outcome.NO_LOOKUP, reason=str(fault), workload=None)
            return replace(on, decision=nothing)

    return replace(situation, kinds=tuple(corrected(on) for on in situation.kinds))


def with_refusal(situation: Situation, reason: str) -> Situation:
    """The situation where SGLang refuses to load the model, in its own words."""
    refused = (
        replace(on, decision=replace(on.decision, outcome=Outcome.LOAD_ERROR, reason=reason, workload=None))
        for on in situation.kinds
    )
    return replace(situation, kinds=tuple(refused))


def asked_of(situation: Situation, answer: Answer) -> Asked:
    """A record of an answer that names files, or says that another kernel runs."""
    names = [look_up for look_up in answer.look_ups if not look_up.down]
    downs = [look_up for look_up in answer.look_ups if look_up.down]
    ran = "" if names else (answer.kernel or answer.reason or answer.outcome.value.replace("_", " "))
    return Asked(
        question_of(situation, situation.first),
        names[0].name if names else "",
        downs[0].name if names and downs else "",
        "asking",
        utc_now(),
        ran,
    )


def _model_folder(model: Model) -> Path | None:
    """A folder with the model's config.json and what lies beside it; None for a name of the catalogue."""
    if model.source is Source.FOLDER:
        return Path(os.path.expanduser(model.name))
    if model.source is Source.HUB and model.revision:
        folder = snapshot_folder(hub_cache(), model.name, model.revision)
        return folder if folder.is_dir() else None
    return None


def _question(situation: Situation, argv: Sequence[str]) -> Question:
    from fixer.model.asking.ask import CardFacts, Question
    from fixer.sglang.declared import declared_of
    from fixer.sglang.secrets import plain_flags

    first, folder = situation.first, _model_folder(situation.model)
    assert folder is not None
    card = first.card
    facts = CardFacts(card.name, card.capability, card.shared_memory, card.memory_mib, count=len(first.cards))
    words = tuple(plain_flags(argv, declared_of(situation.tree)))
    return Question(sys.executable, situation.tree.package, words, folder, facts)
