"""From a command line to a tuned, running server, and the same without the server."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fixer.serve.asking.ask import as_asked
from fixer.artefacts.baked import find_kept, is_baked, with_baked_command
from fixer.model.download.download import downloading
from fixer.base.errors import MoefixError, StoreError, TuneError, told
from fixer.artefacts.install import Installation, Pair, install_pair
from fixer.artefacts.fits import is_known_to_fit, misfit_of, remember_fit
from fixer.serve.launch import MoefixOptions, become_server, reachable, split_flags
from fixer.base.progress import Progress, tell, terminal_progress
from fixer.serve.log.expect import relay_settings, server_url
from fixer.sglang.tree import own_choices
from fixer.serve.situation import Situation, TUNABLE, look_around
from fixer.base.status_board import Board, OnBoard, Phase, new_board, posted
from fixer.artefacts.shelf import Artefact, Decision, Found, data_home, save_artefact, set_aside
from fixer.workload import Workload

if TYPE_CHECKING:
    from fixer.plan.make_plan import CompileFunction, Plan


def serve(argv: Sequence[str]) -> NoReturn:
    """Plan; tune what has no kept, matching artefact; install; then become SGLang's server with the user's flags.

    Raises:
        MoefixError: what makes serving pointless (no such model, no card, no SGLang). A failed tuning is a warning,
            and an error only with --moefix-strict.
    """
    options, server_flags = split_flags(with_baked_command(argv))
    home = home_or_passing(options, Voice(quiet=options.quiet))
    with posted(new_board(home)) as board:
        serve_told(server_flags, options, home, board)
    raise AssertionError("serving returned")


def serve_told(server_flags: Sequence[str], options: MoefixOptions, home: Path, board: Board) -> NoReturn:
    """The same, with everything that others may want to know of it on a board."""
    say = Voice(quiet=options.quiet, board=board)
    situation = look_around(server_flags, home=home, sglang_root=options.sglang_root, smem_limit=options.smem_limit)
    board.update(model=situation.model.name, revision=situation.model.revision or "")
    skip = options.skip_download or options.dry_run
    with downloading(situation.model, situation.flags, home, say, board, skip=skip) as download:
        situation = as_asked(situation, server_flags, options, home, say)
        installations = prepare(situation, options, home, say)
        download.wait()
    environment = {name: value for installation in installations for name, value in installation.env}
    if options.dry_run:
        say.line("dry run: no weights were fetched, SGLang was not asked, and the server is not started")
        sys.exit(0)
    if "fixer.kernel.pool" in sys.modules:
        sys.modules["fixer.kernel.pool"].end_helpers()
    files = dict.fromkeys(path.name for each in installations for path in (each.gate_up_path, each.down_path))
    board.update(phase=Phase.SERVING, detail="SGLang is starting", files=tuple(files), url=server_url(situation.flags))
    relay = relay_settings(situation, installations, home, board.path, quiet=options.quiet)
    become_server(reachable(server_flags, situation.flags.host), environment.items(), relay)


@dataclass(frozen=True)
class Voice:
    """What moefix says on standard error; `quiet` leaves only warnings."""

    quiet: bool = False
    board: Board | None = None

    def line(self, text: str) -> None:
        """Something that is good to know."""
        if not self.quiet:
            self.warning(text)

    def warning(self, text: str) -> None:
        """Something that must be known."""
        tell(text)

    def follow(self, progress: Progress) -> Progress:
        """Have the board show a piece of work's progress too."""
        return progress if self.board is None else OnBoard(progress, self.board)


def home_or_passing(options: MoefixOptions, say: Voice) -> Path:
    """The data folder; where it cannot be written a passing one, since a server is worth more than what is kept.

    Raises:
        StoreError: it cannot be written, and --moefix-strict is on, or there is no place for a passing one either.
    """
    try:
        return data_home(options.home)
    except StoreError as fault:
        if options.strict:
            raise
        say.warning(f"{fault.message}; nothing is kept for the next start. {fault.hint}")
        try:
            return passing_folder()
        except OSError as none:
            raise fault from none


def passing_folder() -> Path:
    """A folder that goes when this process ends, but not when it becomes the server, which may need what is in it.

    Raises:
        OSError: there is no place for one.
    """
    folder = Path(tempfile.mkdtemp(prefix="moefix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SCRATCH_BYTES = 16 << 20
"""What a plan's compiled kernels need of the data folder."""


def scratch_in(home: Path) -> Path:
    """The data folder if it has space for compiled kernels, else a passing one.

    Raises:
        OSError: there is no place for one.
    """
    return home if shutil.disk_usage(home).free >= SCRATCH_BYTES else passing_folder()


def prepare(situation: Situation, options: MoefixOptions, home: Path, say: Voice) -> list[Installation]:
    """Have a tuned pair of files in SGLang's tree for each kind of card, where SGLang reads one."""
    installations = []
    for kind, decision in enumerate(situation.decisions):
        card = situation.cards[kind][0]
        say.line(f"{situation.model.name} on {card.name}, SGLang {situation.tree.version}: {decision.reason}")
        for note in decision.notes:
            say.line(note)
        if decision.outcome not in TUNABLE or decision.workload is None:
            say.line("nothing to tune")
            continue
        try:
            artefact = artefact_for(situation, kind, decision.workload, options, home, say)
            if artefact is not None:
                installations.append(install(artefact, situation, home, say))
        except Exception as error:  # foreseen or not: a server that starts is worth more than a tuning
            if options.strict:
                raise foreseen(error) from error
            fault = foreseen(error)
            say.warning(f"{fault.message} {fault.hint}".strip())
            artefact = None
        if artefact is None:
            installations += fitting_instead(situation, kind, home, say)
    return installations


def foreseen(error: Exception) -> MoefixError:
    """The error itself, or one line for an error that nobody foresaw."""
    if isinstance(error, MoefixError):
        return error
    return TuneError(f"Tuning ended with an error in moefix itself: {told(error)}.", "Please report that line.")


def artefact_for(
    situation: Situation, kind: int, workload: Workload, options: MoefixOptions, home: Path, say: Voice
) -> Artefact | None:
    """The kept artefact that holds here, else a new one; None where there is none and none is wanted."""
    from fixer.tuning.session import covers

    rows = situation.rows(kind)
    found = find_fitting(situation, kind, workload, home, say)
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
    return tune_kind(situation, kind, wish, home, say)


def find_fitting(situation: Situation, kind: int, workload: Workload, home: Path, say: Voice) -> Found:
    """The kept artefact that holds here. One whose tiles the card cannot run is set aside, and reported."""
    from fixer.tuning.session import environment_of

    environment, passed_over = environment_of(situation.tree, situation.cards[kind][0]), set[Path]()
    while True:
        found = find_kept(home, environment, workload, situation.rows(kind), without=passed_over)
        for damaged in found.damaged:
            say.warning(str(damaged))
        if found.artefact is None or found.path is None:
            return found
        why = why_unfit(found.artefact, situation, kind, home, say)
        if not why:
            return found
        passed_over.add(found.path)
        if is_baked(found.path):
            say.warning(f"this image's tuning is not used: {why}")
        else:
            say.warning(str(set_aside(found.path, why)))


def why_unfit(artefact: Artefact, situation: Situation, kind: int, home: Path, say: Voice) -> str:
    """Why the card cannot run an artefact; "" where it can, or where that cannot be found out here, which is said."""
    if is_known_to_fit(home, artefact):
        return ""
    try:
        return misfit_of(artefact, situation.tree, situation.cards[kind][0], home, scratch_in(home))
    except (MoefixError, OSError) as fault:
        say.warning(f"whether the kept tuning fits this card was not checked: {foreseen(fault).message}")
        return ""


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
    """

    rows: tuple[int, ...]
    fresh: bool = False
    exhaustive: bool = False
    record: Path | None = None
    known: Artefact | None = None
    must_keep: bool = False


def tune_kind(situation: Situation, kind: int, wish: Wish, home: Path, say: Voice) -> Artefact:
    """Measure, and keep the result; or take what another moefix on this volume has just measured."""
    from fixer.report.make import report_after_tuning
    from fixer.tuning.session import Job, geometric_gain, state_of_cards, tune, turn
    from fixer.tuning.search.recording import write_recording
    from fixer.artefacts.check_files import set_damaged_aside

    workload = situation.decisions[kind].workload
    assert workload is not None
    card = situation.cards[kind][0]
    with terminal_progress(quiet=say.quiet) as bars, turn(home, card, progress := say.follow(bars)):
        finished = finished_meanwhile(situation, kind, wish, home, say)
        if finished is not None:
            say.line(f"another moefix has tuned this, on {finished.created}: nothing to measure")
            return finished
        vetted = set_damaged_aside(situation.tree, workload, card)
        for bad in vetted.bad:
            say.warning(str(bad))
        job = Job(
            tree=vetted.tree,
            workload=workload,
            cards=situation.cards[kind],
            rows=wish.rows,
            model=situation.model.name,
            revision=situation.model.revision or "",
            home=home,
            exhaustive=wish.exhaustive,
            fresh=wish.fresh,
            layer_package=importable_package(situation),
        )
        for note in state_of_cards(job):
            say.warning(note)
        tuned = tune(job, progress)
        keep(tuned.artefact, home, wish, say)
    for note in tuned.notes:
        say.warning(note)
    if wish.record is not None:
        count = write_recording(wish.record, tuned.looks, tuned.timings)
        say.line(f"recorded {count} times in {wish.record}")
    say.line(verdict(tuned.artefact, geometric_gain(tuned.artefact)))
    say.line("time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in tuned.timeline.items()))
    say.line(report_after_tuning(home, tuned.artefact, situation.tree))
    return tuned.artefact


def finished_meanwhile(situation: Situation, kind: int, wish: Wish, home: Path, say: Voice) -> Artefact | None:
    """What another moefix kept while this one waited for its turn, if it has every row that is wished for."""
    from fixer.tuning.session import covers

    workload = situation.decisions[kind].workload
    if workload is None or wish.fresh or wish.exhaustive or wish.record is not None:
        return None
    found = find_fitting(situation, kind, workload, home, say).artefact
    return found if found not in (None, wish.known) and covers(found, wish.rows) else None


def keep(artefact: Artefact, home: Path, wish: Wish, say: Voice) -> None:
    """Keep an artefact; where that fails it still serves this start, unless it must be kept."""
    try:
        save_artefact(home, artefact)
    except StoreError as fault:
        if wish.must_keep:
            raise
        say.warning(f"the tuning is used now and not kept: {fault.message}. {fault.hint}")
    else:
        remember_fit(home, artefact)  # it has run


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
    return took if gain is None else f"{took}; {100 * (1 - 1 / gain):.1f} % less time on average"


def install(artefact: Artefact, situation: Situation, home: Path, say: Voice) -> Installation:
    """Put an artefact's pair of files where SGLang looks."""
    installation = install_pair(situation.tree.triton_folder, Pair.of(artefact), home, situation.tree.version)
    for note in installation.notes:
        say.line(note)
    say.line(f"installed {installation.gate_up_path} and {installation.down_path.name}")
    return installation


def fitting_instead(situation: Situation, kind: int, home: Path, say: Voice) -> list[Installation]:
    """Without a tuning: SGLang's own configuration where it fits the card, else one that was compiled to fit.

    Whatever SGLang would read and could not run is moved aside first; where it cannot be, something is put before it.
    """
    from fixer.kernel.cache import CompileCache
    from fixer.plan.make_plan import compiler_for, make_plan, write_plan
    from fixer.artefacts.check_files import vet

    card, workload = situation.cards[kind][0], situation.decisions[kind].workload
    assert workload is not None
    try:
        with CompileCache(home) as cache:
            compiler = compiler_for(situation.tree, card, scratch_in(home), cache)
            vetted = vet(situation.tree, workload, card, situation.rows(kind), compiler)
            for bad in vetted.bad:
                say.warning(str(bad))
            if vetted.fits and not vetted.is_stuck:
                say.warning("serving with SGLang's own configuration, which fits this card")
                return []
            left = replace(situation, tree=vetted.tree)
            if not vetted.tree.reads_down_file:
                joint = write_plan(
                    make_plan(left.model, left.flags, card, left.tree, compiler), left.tree.triton_folder
                )
                say.warning(f"serving with a configuration that fits this card and was not measured: {joint[0]}")
                return [Installation(joint[0].parent, joint[0], joint[0], (), ())]
            pair = safe_pair(left, kind, compiler, fits=bool(vetted.fits))
        if pair is None:
            say.warning("serving with SGLang's own configuration, which may not run: nothing is known to fit this card")
            return []
        say.warning("serving with a configuration that fits this card and was not measured")
        return [install_pair(vetted.tree.triton_folder, pair, home, vetted.tree.version)]
    except Exception as error:  # as in `prepare`
        say.warning(f"serving with SGLang's own configuration, which was not checked: {foreseen(error).message}")
        return []


def safe_pair(situation: Situation, kind: int, compiler: CompileFunction, *, fits: bool) -> Pair | None:
    """A pair of files that the card can run, for a release that reads two; None where nothing is known to fit.

    Args:
        fits: SGLang's own choices do: then they are written out, to stand before a file that could not be moved away.
    """
    from fixer.plan.make_plan import make_plan

    card, workload, tree = situation.cards[kind][0], situation.decisions[kind].workload, situation.tree
    assert workload is not None
    if not fits:
        return fitting_pair(make_plan(situation.model, situation.flags, card, tree, compiler))
    lookup = tree.lookup(workload, card)
    choose = own_choices(tree, lookup, workload, card)
    own = {tokens: choose(tokens) for tokens in situation.rows(kind)}
    return Pair(
        lookup.gate_up,
        lookup.down,
        {tokens: replace(choice.gate_up, use_tma=False) for tokens, choice in own.items()},
        {tokens: choice.down for tokens, choice in own.items()},
    )


def fitting_pair(plan: Plan) -> Pair | None:
    """The plan's proposed pair of files; None where a row has no proposal."""
    if plan.lookup is None or any(row.proposed is None for row in plan.rows):
        return None
    proposed = {row.tokens: row.proposed for row in plan.rows if row.proposed is not None}
    return Pair(
        plan.lookup.gate_up,
        plan.lookup.down,
        {tokens: pair.gate_up for tokens, pair in proposed.items()},
        {tokens: pair.down for tokens, pair in proposed.items()},
    )


def tune_only(
    argv: Sequence[str], options: MoefixOptions, *, exhaustive: bool = False, record: Path | None = None
) -> list[Artefact]:
    """Measure and install for every kind of card, without starting a server.

    Returns:
        One artefact for each kind of card on which SGLang reads a tuning file.

    Raises:
        MoefixError: whatever keeps it from measuring.
    """
    home = data_home(options.home)
    with posted(new_board(home)) as board:
        return tune_told(with_baked_command(argv), options, home, board, exhaustive=exhaustive, record=record)


def tune_told(
    argv: Sequence[str], options: MoefixOptions, home: Path, board: Board, *, exhaustive: bool, record: Path | None
) -> list[Artefact]:
    """The same, with everything that others may want to know of it on a board."""

    say = Voice(quiet=options.quiet, board=board)
    situation = look_around(argv, home=home, sglang_root=options.sglang_root, smem_limit=options.smem_limit)
    board.update(model=situation.model.name, revision=situation.model.revision or "")
    situation = as_asked(situation, argv, options, home, say)
    artefacts = []
    for kind, decision in enumerate(situation.decisions):
        card = situation.cards[kind][0]
        say.line(f"{situation.model.name} on {card.name}, SGLang {situation.tree.version}: {decision.reason}")
        if decision.outcome not in TUNABLE or decision.workload is None:
            say.warning("nothing to tune")
            continue
        rows, known = situation.rows(kind), None
        if not options.fresh:
            known = find_fitting(situation, kind, decision.workload, home, say).artefact
            rows = with_rows_of(known, rows)
        wish = Wish(rows, options.fresh, exhaustive, record, known, must_keep=True)
        artefact = tune_kind(situation, kind, wish, home, say)
        for name, value in install(artefact, situation, home, say).env:
            say.warning(f"SGLang's tree cannot be written: start the server with {name}={value}")
        artefacts.append(artefact)
    return artefacts
