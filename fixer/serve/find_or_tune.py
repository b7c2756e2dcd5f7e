"""Find the artefact that holds for this start, or tune one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixer.artefacts.artefact import Artefact, Decision
from fixer.artefacts.baked import find_kept, is_baked
from fixer.artefacts.shelf import Found, save_artefact
from fixer.base.errors import MoefixError, StoreError, TuneError
from fixer.base.progress import terminal_progress
from fixer.base.text import told
from fixer.serve.run import Run
from fixer.serve.situation import OnCard, Situation


def foreseen(error: Exception) -> MoefixError:
    """The error itself, or one line for an error that nobody foresaw."""
    if isinstance(error, MoefixError):
        return error
    return TuneError(f"Tuning ended with an error in moefix itself: {told(error)}.", "Please report that line.")


def artefact_for(run: Run, situation: Situation, on: OnCard) -> Artefact | None:
    """The kept artefact that holds here, else a new one; None where there is none and none is wanted."""
    from fixer.artefacts.gains import covers

    rows, options, say = situation.rows(on), run.options, run.say
    found = find(run, situation, on)
    if found.artefact is not None and not options.fresh:
        if not found.artefact.measured:
            say.line("these configurations fit this card and were not measured; --moefix-fresh tunes on it")
            return found.artefact
        if covers(found.artefact, rows):
            say.line(f"tuned before on {found.artefact.created}: nothing to measure")
            return found.artefact
        say.line("tuned before, but this server runs batch sizes that it does not know: tuning those")
    elif found.mismatch is not None:
        whose = "this image's tuning" if is_baked(found.mismatch.path) else "an earlier tuning"
        say.line(f"{whose} is not used: {'; '.join(found.mismatch.reasons)}")
    if options.skip_tune:
        return found.artefact
    wish = Wish(with_rows_of(found.artefact, rows), fresh=options.fresh, known=found.artefact, must_keep=options.strict)
    return tune_kind(run, situation, on, wish)


def find(run: Run, situation: Situation, on: OnCard) -> Found:
    """The kept artefact that holds here; what is damaged on the way is set aside, and reported."""
    from fixer.artefacts.environment import environment_of

    environment = environment_of(situation.tree, on.card)
    found = find_kept(run.home, environment, on.workload, situation.rows(on))
    for damaged in found.damaged:
        run.say.warning(str(damaged))
    return found


def with_rows_of(kept: Artefact | None, rows: Sequence[int]) -> tuple[int, ...]:
    """The rows that this server needs and those of a kept artefact, so that two servers' rows live side by side."""
    known = {row.batch for row in kept.rows} if kept else set()
    return tuple(sorted({*rows, *known}))


@dataclass(frozen=True)
class Wish:
    """What is to be measured.

    Attributes:
        rows: every M.
        fresh: from scratch.
        exhaustive: the whole space, not a search.
        record: where to write every time, None for nowhere.
        known: the kept artefact that the caller looked at, if any: a newer one is another moefix's answer.
        must_keep: an artefact that cannot be kept is an error.
        ready: called with the artefact before its report is made, which takes seconds.
    """

    rows: tuple[int, ...]
    fresh: bool = False
    exhaustive: bool = False
    record: Path | None = None
    known: Artefact | None = None
    must_keep: bool = False
    ready: Callable[[Artefact], None] = lambda _: None


def tune_kind(run: Run, situation: Situation, on: OnCard, wish: Wish) -> Artefact:
    """Measure, and keep the result; or take what another moefix on this volume has just measured."""
    from fixer.artefacts.check_files import set_damaged_aside
    from fixer.artefacts.gains import geometric_gain
    from fixer.tuning.job import Job
    from fixer.tuning.search.recording import write_recording
    from fixer.tuning.session import tune
    from fixer.tuning.turn import state_of_cards, turn

    home, say, workload, card = run.home, run.say, on.workload, on.card
    with terminal_progress(quiet=say.quiet) as bars, turn(home, card, progress := say.follow(bars)):
        finished = finished_meanwhile(run, situation, on, wish)
        if finished is not None:
            say.line(f"another moefix has tuned this, on {finished.created}: nothing to measure")
            wish.ready(finished)
            return finished
        vetted = set_damaged_aside(situation.tree, workload, card)
        for bad in vetted.bad:
            say.warning(str(bad))
        if vetted.tree.guess:
            say.warning(vetted.tree.guess)
        job = Job(
            tree=vetted.tree,
            workload=workload,
            cards=on.cards,
            rows=wish.rows,
            model=situation.model.name,
            revision=situation.model.revision or "",
            home=home,
            exhaustive=wish.exhaustive,
            fresh=wish.fresh,
            layer_package=importable_package(situation),
        )
        if run.before_tuning is not None:
            run.before_tuning()
        for note in state_of_cards(job):
            say.warning(note)
        tuned = tune(job, progress)
        keep(run, tuned.artefact, wish)
    for note in tuned.notes:
        say.warning(note)
    if wish.record is not None:
        count = write_recording(wish.record, tuned.looks, tuned.timings)
        say.line(f"recorded {count} times in {wish.record}")
    wish.ready(tuned.artefact)
    say.line(verdict(tuned.artefact, geometric_gain(tuned.artefact)))
    say.line("time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in tuned.timeline.items()))
    if run.after_tuning is not None:
        say.line(run.after_tuning(home, tuned.artefact, situation.tree))
    return tuned.artefact


def finished_meanwhile(run: Run, situation: Situation, on: OnCard, wish: Wish) -> Artefact | None:
    """What another moefix kept while this one waited for its turn, if it has every row that is wished for."""
    from fixer.artefacts.gains import covers

    if wish.fresh or wish.exhaustive or wish.record is not None:
        return None
    found = find(run, situation, on).artefact
    return found if found not in (None, wish.known) and covers(found, wish.rows) else None


def keep(run: Run, artefact: Artefact, wish: Wish) -> None:
    """Keep an artefact; where that fails it still serves this start, unless it must be kept."""
    try:
        save_artefact(run.home, artefact)
    except StoreError as fault:
        if wish.must_keep:
            raise
        run.say.warning(f"the tuning is used now and not kept: {fault.message}. {fault.hint}")


def importable_package(situation: Situation) -> Path | None:
    """SGLang's package folder if the server runs from it, else None (a tree that was only unpacked to be read)."""
    package = situation.tree.package
    return package if (package / "launch_server.py").is_file() else None


def verdict(artefact: Artefact, gain: float | None) -> str:
    """One line that says what tuning came to."""
    counts = {decision: sum(row.decision is decision for row in artefact.rows) for decision in Decision}
    rows = f"{counts[Decision.TUNED]} rows faster than SGLang's own, {counts[Decision.KEPT_SGLANG]} kept as they were"
    if counts[Decision.FITTING_ONLY]:
        rows += f", {counts[Decision.FITTING_ONLY]} where SGLang's own does not run on this card"
    took = f"tuned {len(artefact.rows)} batch sizes in {artefact.seconds:.0f} s: {rows}"
    return took if gain is None else f"{took}; {100 * (1 - 1 / gain):.1f} % less time in the MoE layer on average"
