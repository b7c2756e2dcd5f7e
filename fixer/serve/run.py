"""What every step of one start needs: the data folder, the user's options, a voice, and what follows a tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fixer.artefacts.artefact import Artefact
from fixer.base.voice import Voice
from fixer.serve.options import MoefixOptions
from fixer.sglang.tree import Tree

AfterTuning = Callable[[Path, Artefact, Tree], str]
"""Told of each new artefact, with the data folder and SGLang's tree; says in one line what it did (a report, say)."""


@dataclass(frozen=True)
class Run:
    """One start of moefix.

    Attributes:
        home: the data folder.
        options: moefix's own options.
        say: tells the user.
        after_tuning: is told of each new artefact; None for nobody.
        before_tuning: is called as measuring begins; None for nothing.
    """

    home: Path
    options: MoefixOptions
    say: Voice
    after_tuning: AfterTuning | None = None
    before_tuning: Callable[[], None] | None = None
