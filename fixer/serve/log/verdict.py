"""Did SGLang take the files that moefix installed? Read from its log; one verdict, and what to keep for the next start.

Pure: lines and times go in, a verdict comes out. Nothing heavy is imported, since the log's relay runs this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from fixer.serve.possible_names import Limits, why_not
from fixer.sglang.log_lines import QUIET_LEVELS, LogLine, Said

SETTLING_SECONDS = 2.0
"""SGLang looks for both files in one go, on every rank at about the same time: after this, what was seen is all."""

MOST_NAMES = 32
"""Distinct look-ups that are kept. A model has two, with LoRA or two kinds of experts a few more."""


class Outcome(Enum):
    """What became of the files."""

    TAKEN = "both files picked up"
    """For releases that read one joint file: that one."""
    PARTLY = "one of two files picked up"
    OTHER_FILE = "another file asked for"
    OTHER_FOLDER = "another folder read"
    NOT_INSTALLED = "nothing was installed, and SGLang took its own"
    NEVER = "never looked up"
    AS_EXPECTED = "not looked up, as expected"
    NOT_YET = "not yet looked up"
    UNSEEN = "cannot be seen"
    ENDED = "the server ended first"


PASSING = (Outcome.NOT_YET, Outcome.UNSEEN, Outcome.PARTLY)
"""Outcomes that a later line may replace."""

HARMLESS = (Outcome.NOT_YET, Outcome.UNSEEN, Outcome.TAKEN, Outcome.AS_EXPECTED, Outcome.ENDED)
"""Outcomes that are no warning."""


@dataclass(frozen=True)
class Expected:
    """What moefix did, and what it expects of SGLang.

    Attributes:
        pairs: paths of the installed files, (gate-up, down), one pair for each kind of card; down is "" where the
            release reads one joint file.
        names: (gate-up, down) names that the rules worked out, installed or not.
        reads_down: the release has a file of its own for the down projection.
        asks: the rules say that SGLang looks for files.
        reason: the rules' sentence.
        kernel: what runs the experts by the rules.
        log_level: SGLang's.
        lazy: neither graphs nor a warm-up run the model before the server is ready.
        limits: what a name that moefix did not work out must keep to, to be this model's.
        own_form: SGLang's log has a form of the user's own (SGLANG_LOGGING_CONFIG_PATH), which moefix cannot read.
        wordings: what the look-up of the user's own tree writes (`log_wordings.wordings_of`), as (kind, words).
    """

    pairs: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    reads_down: bool = True
    asks: bool = True
    reason: str = ""
    kernel: str = ""
    log_level: str = "info"
    lazy: bool = False
    limits: Limits = field(default_factory=Limits)
    own_form: bool = False
    wordings: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the relay's command line."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Expected:
        """What `to_json` wrote."""
        pairs = {name: tuple((one, other) for one, other in row[name]) for name in ("pairs", "names", "wordings")}
        limits = Limits(**{**row["limits"], "roots": tuple(row["limits"]["roots"])})
        return cls(**{**row, **pairs, "limits": limits})


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        outcome: its kind.
        text: for a person, one line.
        asked: (gate-up, down) names that SGLang asked for in place of the rules' ones, for the next start; None where
            there is nothing to correct.
    """

    outcome: Outcome
    text: str
    asked: tuple[str, str] | None = None


@dataclass(frozen=True)
class Seen:
    """What the log has said so far, each thing once."""

    used: tuple[str, ...] = ()
    fallbacks: tuple[tuple[str, str], ...] = ()
    """(looked for, read)"""
    missing: tuple[str, ...] = ()
    """Looked for and not found, gate-up or down."""
    deterministic: bool = False
    ready: bool = False
    served: bool = False
    ended: bool = False
    lost: bool = False
    """Part of the log was not read."""
    facts: Mapping[str, str] = field(default_factory=dict)

    def plus(self, line: LogLine) -> Seen:
        """With one more line."""
        changes: dict[Said, dict[str, Any]] = {
            Said.USING: {"used": _with(self.used, line.used)},
            Said.FALLBACK: {"fallbacks": _with(self.fallbacks, (line.wanted, line.used))},
            Said.DEFAULT: {"missing": _with(self.missing, line.wanted)},
            Said.REUSED_UP: {"missing": _with(self.missing, line.wanted)},
            Said.NO_DOWN: {"missing": _with(self.missing, line.wanted)},
            Said.DETERMINISTIC: {"deterministic": True},
            Said.READY: {"ready": True},
            Said.SERVED: {"served": True},
            Said.ARGUMENTS: {"facts": {**self.facts, **dict(line.facts)}},
            Said.METHOD: {"facts": {**self.facts, **dict(line.facts)}},
        }
        return replace(self, **changes.get(line.said, {}))

    @property
    def looked(self) -> bool:
        """SGLang looked for a file at all."""
        return bool(self.used or self.fallbacks or self.missing)

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the gate-up files (or joint ones) that SGLang looked for, in order of what became of them."""
        return tuple(dict.fromkeys(up_name(os.path.basename(path)) for path in self.paths))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that SGLang looked for."""
        return (*self.used, *(wanted for wanted, _ in self.fallbacks), *self.missing)


def _with(known: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
    return known if new in known or len(known) >= MOST_NAMES else (*known, new)


def up_name(name: str) -> str:
    """The gate-up file's name that belongs to either name of a pair."""
    return name.removesuffix("_down.json") + ".json" if name.endswith("_down.json") else name


def down_name(name: str) -> str:
    """The down file's name that belongs to a gate-up file's."""
    return name.removesuffix(".json") + "_down.json"


def judge(expected: Expected, seen: Seen, *, settled: bool) -> Verdict | None:
    """The verdict that what was seen allows, None where it is too early.

    Args:
        settled: no new look-up came for a while, so that half a pair means that the other half is missing.
    """
    taken = _taken(expected, seen)
    if taken is not None:
        return taken
    settled = settled or seen.ready or seen.ended
    own, foreign = _own_look_ups(expected, seen)
    if own.looked:
        verdict = _other(expected, own) if settled else None
    elif foreign and not expected.asks:
        text = "SGLang's log names {}, which is not kept and not tuned: {}; {}".format(*foreign, expected.reason)
        verdict = Verdict(Outcome.AS_EXPECTED, text) if settled else None
    else:
        verdict = _without_look_up(expected, own)
    if seen.lost and verdict is not None and verdict.outcome in _BY_ABSENCE:
        return Verdict(Outcome.UNSEEN, _LOST)
    return verdict


_BY_ABSENCE = (Outcome.PARTLY, Outcome.NEVER, Outcome.AS_EXPECTED, Outcome.ENDED)  # a line was not there
_LOST = "SGLang's log came faster than moefix reads along: which MoE files SGLang took was not seen"
_OWN_FORM = "SGLANG_LOGGING_CONFIG_PATH gives SGLang's log a form of its own: moefix may not see which files it takes"


def _taken(expected: Expected, seen: Seen) -> Verdict | None:
    used = {_place(path) for path in seen.used}
    for up, down in expected.pairs:
        if _place(up) in used and (not down or _place(down) in used):
            names = os.path.basename(up) + (f" and {os.path.basename(down)}" if down else "")
            both = "both files" if down else "the file"
            return Verdict(Outcome.TAKEN, f"SGLang picked up {both}: {names}")
    return None


def _place(path: str) -> tuple[str, str]:
    """A file by its folder's real place and its own name: an overlay's files may be links, and the folder too."""
    folder, name = os.path.split(path)
    return os.path.realpath(folder), name


def _known(expected: Expected) -> set[str]:
    """The gate-up names that moefix worked out or installed."""
    return {up for up, _ in expected.names} | {os.path.basename(up) for up, _ in expected.pairs}


def _other(expected: Expected, seen: Seen) -> Verdict:
    known = _known(expected)
    strange = [name for name in seen.asked if name not in known]
    if strange and (len(strange) == len(seen.asked) or not expected.asks):
        return _other_file(expected, seen, strange[0])
    used = {_place(path) for path in seen.used}
    for up, down in expected.pairs:
        name = os.path.basename(up)
        if name not in seen.asked:
            continue
        if _place(up) in used or (down and _place(down) in used):
            got, lost = (up, down) if _place(up) in used else (down, up)
            text = f"SGLang picked up {os.path.basename(got)}, but not {os.path.basename(lost)}: it {_fate(seen, lost)}"
            return Verdict(Outcome.PARTLY, text)
        return Verdict(
            Outcome.OTHER_FOLDER,
            f"SGLang looked for {name}, but not in {os.path.dirname(up)}, where moefix put it: it {_fate(seen, up)}",
        )
    own = next((name for name in seen.asked if name in known), seen.asked[0])
    return Verdict(Outcome.NOT_INSTALLED, f"SGLang runs without a file of moefix: it {_fate(seen, own)}")


def _other_file(expected: Expected, seen: Seen, name: str) -> Verdict:
    meant = os.path.basename(expected.pairs[0][0]) if expected.pairs else next((up for up, _ in expected.names), "")
    contrast = f", not for {meant}" if meant else f", although {expected.reason}"
    down = down_name(name) if expected.reads_down else ""
    return Verdict(
        Outcome.OTHER_FILE,
        f"SGLang asked for another file: {name}{contrast}; it {_fate(seen, name)}. "
        "The name is kept: the next start tunes exactly that file",
        (name, down),
    )


def _own_look_ups(expected: Expected, seen: Seen) -> tuple[Seen, tuple[str, str] | None]:
    """What was seen without look-ups that cannot be this model's Triton kernel's; the first of those, and why not."""
    known, kernel = _known(expected), "" if expected.asks else expected.kernel
    strange = [path for path in seen.paths if up_name(os.path.basename(path)) not in known]
    whys = {path: why_not(up_name(path), expected.limits, kernel) for path in strange}
    foreign = {path: why for path, why in whys.items() if why}
    if not foreign:
        return seen, None
    own = replace(
        seen,
        used=tuple(path for path in seen.used if path not in foreign),
        fallbacks=tuple(pair for pair in seen.fallbacks if pair[0] not in foreign),
        missing=tuple(path for path in seen.missing if path not in foreign),
    )
    return own, next((os.path.basename(path), why) for path, why in foreign.items())


def _fate(seen: Seen, path: str) -> str:
    """What SGLang did about a name, as the end of a sentence."""
    name = os.path.basename(path)
    for used in seen.used:
        if os.path.basename(used) == name:
            return f"read {used}"
    for wanted, used in seen.fallbacks:
        if os.path.basename(wanted) == name:
            return f"fell back to {used}, since there is no {wanted}"
    for wanted in seen.missing:
        if os.path.basename(wanted) == name:
            return f"found no {wanted}"
    return "did not say what became of it"


def _without_look_up(expected: Expected, seen: Seen) -> Verdict | None:
    if seen.deterministic:
        return _never(expected, _DETERMINISTIC)
    if seen.served or (seen.ready and not expected.lazy):
        return _never(expected, ran_instead(expected, seen))
    if seen.ended:
        return Verdict(Outcome.ENDED, "SGLang ended before it looked for a MoE file") if expected.asks else None
    return _not_yet(expected, seen)


def _not_yet(expected: Expected, seen: Seen) -> Verdict | None:
    if seen.ready:
        return Verdict(
            Outcome.NOT_YET,
            "SGLang has not looked for a MoE file yet: without CUDA graphs and warm-up it does so at the first request",
        )
    if expected.asks and expected.own_form:
        return Verdict(Outcome.UNSEEN, _OWN_FORM)
    if expected.asks and expected.log_level in QUIET_LEVELS:
        missing = "; it would say that one is missing" if expected.log_level == "warning" else ""
        return Verdict(
            Outcome.UNSEEN,
            f"with --log-level {expected.log_level} SGLang does not say which MoE files it reads{missing}",
        )
    return None


_DETERMINISTIC = "deterministic inference is on, and fixes the kernel's configuration"


def _never(expected: Expected, ran: str) -> Verdict:
    if not expected.asks:
        return Verdict(Outcome.AS_EXPECTED, f"SGLang looked for no MoE file, as expected: {ran}")
    return Verdict(Outcome.NEVER, f"SGLang never looked for a MoE file: {ran}")


def ran_instead(expected: Expected, seen: Seen) -> str:
    """What ran the experts, by the log, else by the rules."""
    facts = seen.facts
    if facts.get("enable_deterministic_inference") == "True":
        return _DETERMINISTIC
    if facts.get("moe_a2a_backend", "none") not in {"none", "None"}:
        return f"its experts run behind moe_a2a_backend={facts['moe_a2a_backend']}"
    if facts.get("moe_runner_backend", "auto") not in {"auto", "triton"}:
        return f"moe_runner_backend={facts['moe_runner_backend']} runs its experts"
    if "method" in facts:
        return f"{facts['method']} runs its experts"
    if expected.asks:
        return f"its log does not say what runs the experts; moefix had worked out: {expected.reason}"
    return expected.reason


class Watch:
    """Follows one server's log and says each thing once.

    Args:
        expected: what moefix did.
    """

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.seen = Seen()
        self.verdict: Verdict | None = None
        self._settles: float | None = None
        self._named: set[str] = set()

    @property
    def wakes_at(self) -> float | None:
        """The time, on the clock of `now`, at which `news` must be called although no line came; None for never."""
        return self._settles

    def see(self, line: LogLine, now: float) -> None:
        """Take in one line."""
        before = self.seen
        self.seen = before.plus(line)
        if self.seen.looked and self.seen != before and not self._final:
            self._settles = now + SETTLING_SECONDS

    def lose(self) -> None:
        """A part of the log was not read."""
        self.seen = replace(self.seen, lost=True)

    def end(self) -> None:
        """The log has ended."""
        self.seen = replace(self.seen, ended=True)

    @property
    def _final(self) -> bool:
        return self.verdict is not None and self.verdict.outcome not in PASSING

    def news(self, now: float) -> Verdict | None:
        """A verdict that was not given before, None where there is nothing new."""
        if self._final:
            return self._more()
        settled = self._settles is not None and now >= self._settles
        verdict = judge(self.expected, self.seen, settled=settled)
        if settled:
            self._settles = None
        if verdict is None or (self.verdict is not None and verdict.outcome is self.verdict.outcome):
            return None
        self.verdict = verdict
        self._named = set(self.seen.asked)
        if self._final:
            self._settles = None
        return verdict

    def _more(self) -> Verdict | None:
        """A file of another shape that SGLang asked for later: two kinds of experts, LoRA, a draft model."""
        assert self.verdict is not None
        own, _ = _own_look_ups(self.expected, self.seen)
        later = [name for name in own.asked if name not in self._named]
        if not later:
            return None
        self._named.update(later)
        text = f"SGLang also asked for {later[0]}: it {_fate(self.seen, later[0])}"
        return Verdict(self.verdict.outcome, text)
