"""From a command line to a tuned, running server, and the same without the server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.baked import with_baked_command
from fixer.artefacts.install import Installation
from fixer.base.data_folder import data_home, passing_folder
from fixer.base.errors import StoreError
from fixer.base.running_servers import run_variable
from fixer.base.status import Phase
from fixer.base.status_board import Board, new_board, posted
from fixer.base.voice import Voice
from fixer.model.download.download import downloading
from fixer.serve.asking import Asking
from fixer.serve.find_or_tune import Wish, find, tune_kind, with_rows_of
from fixer.serve.launch import become_server, reachable
from fixer.serve.log.expect import relay_settings, server_url
from fixer.serve.options import MoefixOptions, split_flags
from fixer.serve.prepare import install, prepare
from fixer.serve.run import AfterTuning, Run
from fixer.serve.situation import OnCard, Situation, look_around


def serve(argv: Sequence[str], after_tuning: AfterTuning | None = None) -> NoReturn:
    """Plan; tune what has no kept, matching artefact; install; then become SGLang's server with the user's flags.

    Everything that others may want to know of it is in the state file meanwhile.

    Args:
        argv: moefix's options and SGLang's flags, in any order.
        after_tuning: see `Run`.

    Raises:
        MoefixError: what makes serving pointless (no such model, no card, no SGLang). A failed tuning is a warning,
            and an error only with --moefix-strict.
    """
    options, server_flags = split_flags(with_baked_command(argv))
    home = home_or_passing(options, Voice(quiet=options.quiet))
    with posted(new_board(home)) as board:
        say = Voice(quiet=options.quiet, board=board)
        run = Run(home, options, say, after_tuning)
        situation = look_around(server_flags, home=home, sglang_root=options.sglang_root, smem_limit=options.smem_limit)
        board.update(model=situation.model.name, revision=situation.model.revision or "")
        skip = options.skip_download or options.dry_run
        with downloading(situation.model, situation.flags, home, say, board, skip=skip) as download:
            asking = Asking(run, situation, server_flags)
            situation = asking.before_tuning()
            installations = prepare(replace(run, before_tuning=asking.begin), situation)
            corrected = asking.after_tuning()
            if corrected is not None:
                situation, installations = corrected, prepare(run, corrected)
            download.wait()
        if options.dry_run:
            say.line("dry run: no weights were fetched, SGLang was not asked, and the server is not started")
            sys.exit(0)
        become(run, board, situation, installations, server_flags)


def become(
    run: Run, board: Board, situation: Situation, installations: Sequence[Installation], argv: Sequence[str]
) -> NoReturn:
    """Become SGLang's server, whose output passes through a process that reads along."""
    if "fixer.kernel.pool" in sys.modules:
        sys.modules["fixer.kernel.pool"].end_helpers()
    environment = {name: value for installation in installations for name, value in installation.env}
    files = dict.fromkeys(path.name for each in installations for path in each.paths)
    board.update(phase=Phase.SERVING, detail="SGLang is starting", files=tuple(files), url=server_url(situation.flags))
    environment.update([run_variable(board.status.run, board.status.url)])
    relay = relay_settings(situation, installations, run.home, board.path, quiet=run.options.quiet)
    become_server(reachable(argv, situation.flags.host), environment.items(), relay)


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


def is_answered(kept: Artefact, rows: Sequence[int]) -> bool:
    """Whether a kept artefact, which holds here, was measured and has every row that a server needs."""
    from fixer.artefacts.gains import covers

    return kept.measured and covers(kept, rows)


def install_for_later(run: Run, situation: Situation, artefact: Artefact) -> None:
    """Install, and say what the server's start has to be told."""
    for name, value in install(run, situation, artefact).env:
        run.say.warning(f"SGLang's tree cannot be written: start the server with {name}={value}")


def tune_only(
    argv: Sequence[str],
    options: MoefixOptions,
    *,
    exhaustive: bool = False,
    record: Path | None = None,
    after_tuning: AfterTuning | None = None,
) -> list[Artefact]:
    """Measure and install for every kind of card, without starting a server.

    Args:
        exhaustive: time the whole space.
        record: write every time there.
        after_tuning: see `Run`.

    Returns:
        One artefact for each kind of card on which SGLang reads a tuning file.

    Raises:
        MoefixError: whatever keeps it from measuring.
    """
    home, words = data_home(options.home), with_baked_command(argv)
    with posted(new_board(home)) as board:
        run = Run(home, options, Voice(quiet=options.quiet, board=board), after_tuning)
        situation = look_around(words, home=home, sglang_root=options.sglang_root, smem_limit=options.smem_limit)
        board.update(model=situation.model.name, revision=situation.model.revision or "")
        asking = Asking(run, situation, words)
        situation, asks = asking.before_tuning(), replace(run, before_tuning=asking.begin)
        artefacts = [tune_on(asks, situation, on, exhaustive=exhaustive, record=record) for on in situation.kinds]
        corrected = asking.after_tuning()
        if corrected is not None:
            artefacts = [tune_on(run, corrected, on, exhaustive=exhaustive, record=record) for on in corrected.kinds]
        return [artefact for artefact in artefacts if artefact is not None]


def tune_on(run: Run, situation: Situation, on: OnCard, *, exhaustive: bool, record: Path | None) -> Artefact | None:
    """Measure on one kind of card what is not yet measured, and install it; None where there is nothing to tune."""
    say, options = run.say, run.options
    say.line(f"{situation.model.name} on {on.card.name}, SGLang {situation.tree.version}: {on.decision.reason}")
    if not on.is_tunable:
        say.warning("nothing to tune")
        return None
    rows, known = situation.rows(on), None
    if not options.fresh:
        known = find(run, situation, on).artefact
    ready = partial(install_for_later, run, situation)
    if known is not None and is_answered(known, rows) and not exhaustive and record is None:
        say.line(f"tuned before on {known.created}: nothing to measure; --fresh measures anew")
        ready(known)
        return known
    rows = with_rows_of(known, rows)
    wish = Wish(rows, options.fresh, exhaustive, record, known, must_keep=True, ready=ready)
    return tune_kind(run, situation, on, wish)
