"""What the log's relay is told of a start: what to expect of SGLang, and where to keep what comes of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fixer.artefacts.install import Installation
from fixer.model.rules.case import Outcome
from fixer.serve.asked import find, record_path
from fixer.serve.asked_question import limits_of, question_of
from fixer.serve.log.settings import Settings
from fixer.serve.log.verdict import Expected
from fixer.serve.situation import Situation
from fixer.sglang.flags import ServerFlags
from fixer.sglang.log_lines import Wording
from fixer.sglang.log_wordings import wordings_of
from fixer.sglang.lookup import LOOKUP_SOURCES
from fixer.workload import Projection

LOOKS = (Outcome.ASKS, Outcome.UNCERTAIN, Outcome.ASKS_THEN_CRASHES)
"""Outcomes with which SGLang looks for a file."""


def relay_settings(
    situation: Situation, installations: Sequence[Installation], home: Path, state: Path, *, quiet: bool
) -> Settings:
    """The relay's settings for a server that is about to start.

    Args:
        installations: what moefix installed, one for each kind of card at most.
        state: this process's state file.
    """
    question = question_of(situation, situation.first)
    asked, _ = find(home, question)
    known = ((asked.gate_up, asked.down),) if asked is not None and asked.gate_up else ()
    return Settings(
        expected=expectation(situation, installations, known),
        card=situation.first.card.name,
        quiet=quiet,
        state=str(state),
        record=str(record_path(home, question)),
        question=asdict(question),
    )


def expectation(
    situation: Situation, installations: Sequence[Installation], known: tuple[tuple[str, str], ...] = ()
) -> Expected:
    """What SGLang's log should say. SGLang names its files after the first card, which is of the first kind.

    Args:
        known: names that are on record already, whether moefix could tune for them or not.
    """
    first, flags, tree = situation.first.decision, situation.flags, situation.tree
    reads_down = tree.reads_down_file
    names = tuple(
        (tree.file_name(on.workload, on.card, up), tree.file_name(on.workload, on.card, down))
        for on in situation.kinds
        for up, down in [(Projection.GATE_UP, Projection.DOWN)]
        if on.decision.workload is not None
    )
    roots = {tree.configs, tree.shipped_configs, *(each.folder.parent for each in installations)}
    return Expected(
        pairs=tuple((str(each.paths[0]), str(each.paths[-1]) if reads_down else "") for each in installations),
        names=(*names, *known),
        reads_down=reads_down,
        asks=first.outcome in LOOKS,
        reason=first.reason,
        kernel=first.kernel,
        log_level=flags.log_level,
        lazy=flags.disable_cuda_graph and flags.skip_server_warmup,
        limits=limits_of(situation, tuple(sorted(map(str, roots)))),
        own_form=bool(os.environ.get("SGLANG_LOGGING_CONFIG_PATH")),
        wordings=tuple((said.name, words) for said, words in _wordings(tree.package)),
    )


def _wordings(package: Path) -> tuple[Wording, ...]:
    """What the look-up of the tree writes; nothing where it cannot be read, and then the known words count."""
    for source in LOOKUP_SOURCES:
        with contextlib.suppress(OSError, ValueError):
            return wordings_of((package / source).read_text("utf-8"))
    return ()


def server_url(flags: ServerFlags) -> str:
    """Where the server is to be asked whether it is healthy; a server on all interfaces is asked on the loopback."""
    given = flags.host or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(given, given)  # noqa: S104
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'https' if flags.ssl_certfile else 'http'}://{shown}:{flags.port}"
