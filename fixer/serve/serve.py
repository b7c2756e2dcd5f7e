"""From a command line to a tuned, running server, and the same without the server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.baked import with_baked_command
from fixer.base.data_folder import data_home, passing_folder
from fixer.base.errors import StoreError
from fixer.base.status import Phase
from fixer.base.status_board import Board, new_board, posted
from fixer.base.status_reading import run_variable
from fixer.base.voice import Voice
from fixer.model.download.download import downloading
from fixer.serve.asking.as_asked import as_asked
from fixer.serve.find_or_tune import Wish, find_fitting, tune_kind, with_rows_of
from fixer.serve.launch import become_server, reachable
from fixer.serve.log.expect import relay_settings, server_url
from fixer.serve.options import MoefixOptions, split_flags
from fixer.serve.prepare import install, prepare
from fixer.serve.situation import TUNABLE, look_around

if TYPE_CHECKING:
    pass


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
    environment.update([run_variable(board.status)])
    become_server(reachable(server_flags, situation.flags.host), environment.items(), relay)


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
        if known is not None and is_answered(known, rows) and not exhaustive and record is None:
            say.line(f"tuned before on {known.created}: nothing to measure; --fresh measures anew")
            artefact = known
        else:
            wish = Wish(with_rows_of(known, rows), options.fresh, exhaustive, record, known, must_keep=True)
            artefact = tune_kind(situation, kind, wish, home, say)
        for name, value in install(artefact, situation, home, say).env:
            say.warning(f"SGLang's tree cannot be written: start the server with {name}={value}")
        artefacts.append(artefact)
    return artefacts
