"""Run the checks side by side, each with a deadline."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from fixer.base.data_folder import DataFolder
from fixer.base.errors import CardError, MoefixError, SGLangError, UsageError
from fixer.base.text import told
from fixer.machine.cards import Card
from fixer.machine.driver import visible_cards
from fixer.sglang.declared import declared_of
from fixer.sglang.find_tree import find_tree
from fixer.sglang.flags import ServerFlags, parse_flags
from fixer.sglang.tree import Tree

SCHEMA = 1


class State(Enum):
    """What a finding means."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        state: what it means.
        text: what is so.
        fix: what to do, "" where nothing is to be done.
    """

    check: str
    state: State
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """The row of `moefix doctor --json`."""
        return {"check": self.check, "state": self.state.value, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        home: the data folder; it may not exist.
        argv: the model and other SGLang flags; () for none.
        sglang_root: a tree to use instead of the installed one.
    """

    home: Path
    argv: tuple[str, ...] = ()
    sglang_root: Path | None = None

    @cached_property
    def cards(self) -> tuple[Card, ...]:
        """The visible cards; a driver that fails is for the driver's own check to tell."""
        with contextlib.suppress(CardError):
            return visible_cards()
        return ()

    @cached_property
    def tree(self) -> Tree:
        """SGLang's.

        Raises:
            SGLangError: there is none.
        """
        return find_tree(
            str(self.sglang_root) if self.sglang_root else None, None, DataFolder(self.home).cache, fetch=False
        )

    @cached_property
    def flags(self) -> ServerFlags:
        """The parsed flags; without a tree unknown ones pass."""
        try:
            return parse_flags(self.argv, declared_of(self.tree))
        except SGLangError:
            return parse_flags(self.argv)


@dataclass(frozen=True)
class Check:
    """One look: its name, what it does, its deadline in seconds, and what it means when the deadline passes."""

    name: str
    look: Callable[[Patient], Iterable[Finding]]
    seconds: float = 20.0
    hung: State = State.FAILURE


def examine(patient: Patient, checks: Sequence[Check]) -> Iterator[Finding]:
    """Every finding, in the order of the checks, which run at the same time."""
    rooms = [_Room(check, patient) for check in checks]
    for room in rooms:
        yield from room.findings()


def worst(findings: Iterable[Finding]) -> State:
    """The gravest state."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAILURE, State.WARNING) if state in states), State.OK)


class _Room:
    """A check at work. The thread is a daemon: one that hangs in the driver does not keep the program from ending."""

    def __init__(self, check: Check, patient: Patient) -> None:
        self._check = check
        self._patient = patient
        self._found: list[Finding] = []
        self._is_done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._found = list(self._check.look(self._patient))
        except MoefixError as fault:
            self._found = [Finding(self._check.name, State.FAILURE, fault.message, fault.hint)]
        except Exception as fault:  # a check that fails is a finding, and the others go on
            self._found = [Finding(self._check.name, State.FAILURE, f"it could not be checked: {told(fault)}")]
        self._is_done.set()

    def findings(self) -> list[Finding]:
        if self._is_done.wait(self._check.seconds):
            return self._found
        return [Finding(self._check.name, self._check.hung, f"no answer within {self._check.seconds:g} s", _HUNG_FIX)]


_HUNG_FIX = "Something hangs: see nvidia-smi and dmesg for the driver, the network and proxy settings for the hub."


def run_program(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program's answer. It ends a little before its check's deadline, so that it does not outlive this one."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        **options,
    )


def wished_home(chosen: Path | None) -> Path:
    """The data folder, whether it can be written or not.

    Raises:
        UsageError: this user has no home folder, and none is named.
    """
    from fixer.base.data_folder import wanted_home
    from fixer.base.errors import StoreError

    try:
        return wanted_home(chosen)
    except StoreError as fault:
        raise UsageError(fault.message, fault.hint) from fault
