"""Every fault that moefix foresees, each with the exit code that the README documents.

A message names what was wrong; `hint` is the next step for the person who reads it. The command line prints both
and exits with `exit_code`, never with a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class MoefixError(Exception):
    """A foreseeable fault.

    Args:
        message: one line that names what was wrong.
        hint: one line that says what to do next, or "" where the message already does.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoefixError):
    """A flag or an argument that cannot be used as given."""

    exit_code: ClassVar[int] = 2


class ModelError(MoefixError):
    """The model cannot be read, or its config.json makes no sense."""

    exit_code: ClassVar[int] = 3


class CardError(MoefixError):
    """No such card is known, none is visible, or it cannot be used."""

    exit_code: ClassVar[int] = 4


class SGLangError(MoefixError):
    """SGLang's tree or kernel is not there or is not of a form that moefix knows."""

    exit_code: ClassVar[int] = 5


class HubError(MoefixError):
    """A hub did not give what was asked for: unreachable, gated, missing."""

    exit_code: ClassVar[int] = 6


class CompileError(MoefixError):
    """The compiler itself could not be used (a single candidate that does not compile is an outcome, no error)."""

    exit_code: ClassVar[int] = 7


class TuneError(MoefixError):
    """Measuring failed as a whole."""

    exit_code: ClassVar[int] = 8


class StoreError(MoefixError):
    """The data folder or SGLang's tree cannot be read or written."""

    exit_code: ClassVar[int] = 9


class DockerError(MoefixError):
    """Docker is not there, or refuses."""

    exit_code: ClassVar[int] = 10
