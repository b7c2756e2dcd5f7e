"""What a tuning came to, in numbers and words: the one source of what the page and the terminal say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fixer.artefacts.artefact import Artefact, Decision, RowChoice, Times
from fixer.artefacts.gains import compared_times, geometric_gain
from fixer.bench.results import Kind, short_name
from fixer.bench.words import headline as bench_headline
from fixer.machine.cards import known_cards
from fixer.report.evidence import Evidence
from fixer.report.roofline import Peak, Share, peak_of, share_of
from fixer.tuning.duel import CONFIDENCE, LEAST_GAIN
from fixer.workload import RowTiles


class Worth(Enum):
    """Whether it was worth it."""

    FASTER = "faster"
    CURED = "cured"
    """SGLang's own configuration does not run here, and other rows are faster too (or there are no others)."""
    NEUTRAL = "neutral"
    NOT_MEASURED = "not measured"


class Fate(Enum):
    """What became of a row."""

    FASTER = "faster"
    KEPT = "kept"
    CURED = "cured"
    """SGLang's own configuration does not run on this card."""
    UNJUDGED = "unjudged"
    """SGLang's own configuration, kept because it could not be timed."""
    UNMEASURED = "unmeasured"
    """Known to fit the card, and never timed."""


@dataclass(frozen=True)
class Row:
    """One batch size.

    Attributes:
        batch: M, in tokens.
        fate, words: what became of it.
        own_us, tuned_us: microseconds of a forward through the layer, or of all kernels where `through_layer` is
            False; None where one of the two was not timed.
        less: the fraction of time that is saved: 0.072 is 7.2 % less; None where there is nothing to compare.
        margin: what `less` had to clear, as a fraction; None where SGLang's own was the winner or was not timed.
        choice: the artefact's row.
        own: SGLang's own tiles, None where not known.
        shared, own_shared: bytes of each product's kernel, each None where not known.
        share, own_share: how near all kernels together come to the card's limits; None where not known.
    """

    batch: int
    fate: Fate
    words: str
    own_us: float | None
    tuned_us: float | None
    through_layer: bool
    less: float | None
    margin: float | None
    choice: RowChoice
    own: RowTiles | None
    shared: tuple[int | None, ...]
    own_shared: tuple[int | None, ...]
    share: Share | None
    own_share: Share | None

    @property
    def bounds(self) -> str:
        """What `less` may be, three standard errors either way: "15.0 to 33.0 %"; "" where the noise is not known."""
        if self.less is None or self.choice.noise is None:
            return ""
        reach = CONFIDENCE * self.choice.noise
        return f"{100 * (self.less - reach):.1f} to {percent(self.less + reach)}"

    @property
    def pair(self) -> RowTiles:
        """The chosen tiles."""
        return self.choice.tiles


@dataclass(frozen=True)
class Summary:
    """A report's content.

    Attributes:
        worth, headline: the answer, in a few words.
        changed: what is different now, in a sentence or two.
        model: the model's short name; `artefact.model` is the name as the user gave it.
        less: time saved on average (geometric mean over the compared rows), as a fraction; None without any.
        best: the row that gained most, None where none gained.
        rows: by ascending batch size.
        peak: the card's published limits, None where not known.
    """

    worth: Worth
    headline: str
    changed: str
    model: str
    less: float | None
    best: Row | None
    rows: tuple[Row, ...]
    peak: Peak | None
    evidence: Evidence

    @property
    def artefact(self) -> Artefact:
        """The tuning."""
        return self.evidence.artefact

    @property
    def limit(self) -> str:
        """ "101376 of 232448 bytes of shared memory a block" where the tuning pretended a smaller card, else ""."""
        environment = self.artefact.environment
        own = next((card.shared_memory for card in known_cards() if card.name == environment.card), 0)
        limited = environment.shared_memory < own
        return f"{environment.shared_memory} of {own} bytes of shared memory a block" if limited else ""

    @property
    def place(self) -> str:
        """What the tuning holds for: the card, and the limit if it was simulated."""
        return self.artefact.environment.card + (f" with {self.limit}" if self.limit else "")

    @property
    def server(self) -> str:
        """What the newest comparison of servers came to, in one line, "" without one."""
        result = self.evidence.bench.get(Kind.SERVE)
        return "" if result is None else bench_headline(result)

    def count(self, *fates: Fate) -> int:
        """How many rows had one of these fates."""
        return sum(row.fate in fates for row in self.rows)

    @property
    def reached(self) -> str:
        """How near the rows come to the card's limits, "" where that is not known."""
        shares = [(row.share, row.batch) for row in self.rows if row.share is not None]
        if not shares:
            return ""
        memory, at = max((share.memory, batch) for share, batch in shares)
        text = f"at most {percent(memory)} of the card's memory bandwidth (M = {at})"
        compute = [(share.compute, batch) for share, batch in shares if share.compute is not None]
        if compute:
            most, at = max(compute)
            text += f", {percent(most)} of its matrix operations (M = {at})"
        return text

    @property
    def through_layer(self) -> bool:
        """Whether every compared row was timed through SGLang's own layer."""
        return all(row.through_layer for row in self.rows if row.less is not None)


def summarise(evidence: Evidence) -> Summary:
    """What a tuning came to."""
    artefact = evidence.artefact
    peak = peak_of(artefact.environment.card)
    rows = tuple(_row(choice, evidence, peak) for choice in artefact.rows)
    gain = geometric_gain(artefact)
    less = None if gain is None else 1 - 1 / gain
    best = max((row for row in rows if row.less), key=lambda row: row.less or 0.0, default=None)
    worth, headline = _headline(artefact, rows, less)
    return Summary(worth, headline, _changed(rows, best), short_name(artefact.model), less, best, rows, peak, evidence)


def percent(fraction: float) -> str:
    """A fraction as "7.2 %"; never "-0.0 %"."""
    return f"{round(100 * fraction, 1) + 0.0:.1f} %"


def microseconds(value: float) -> str:
    """A time in microseconds with four digits at most: "9.104", "25.41", "1052"."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0}f}"


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(choice: RowChoice, evidence: Evidence, peak: Peak | None) -> Row:
    artefact = evidence.artefact
    compared = compared_times(choice)
    own_us, tuned_us = compared or (None, None)
    own = evidence.own_pair(choice.batch)
    shared, own_shared = evidence.bytes_of(choice.tiles), evidence.bytes_of(own)
    fate = _fate(choice, measured=artefact.measured)
    less = 1 - tuned_us / own_us if own_us is not None and tuned_us is not None else None
    margin = None if choice.noise is None else max(LEAST_GAIN, CONFIDENCE * choice.noise)
    family = artefact.family

    def share(times: Times) -> Share | None:
        known = [time for time in times if time is not None]
        work = family.work(artefact.workload, choice.batch)
        if peak is None or work is None or len(known) < len(times):
            return None
        return share_of(work, sum(known), peak, family.number_format(artefact.workload))

    return Row(
        batch=choice.batch,
        fate=fate,
        words=_words(fate, less, margin, own_shared, artefact.environment.shared_memory),
        own_us=own_us,
        tuned_us=tuned_us,
        through_layer=None not in choice.layer_times,
        less=less,
        margin=margin,
        choice=choice,
        own=own,
        shared=shared,
        own_shared=own_shared,
        share=share(choice.us),
        own_share=share(choice.sglang_us),
    )


def _fate(choice: RowChoice, *, measured: bool) -> Fate:
    match choice.decision:
        case Decision.TUNED:
            return Fate.FASTER
        case Decision.KEPT_SGLANG:
            return Fate.KEPT
    if not measured:
        return Fate.UNMEASURED
    # A row whose own tiles could not run has its winner's times; one that could not be judged has none.
    timed = any(time is not None for time in (*choice.us, choice.layer_us))
    return Fate.CURED if timed else Fate.UNJUDGED


def _words(fate: Fate, less: float | None, margin: float | None, own_shared: tuple[int | None, ...], limit: int) -> str:
    match fate:
        case Fate.FASTER:
            return "faster" if less is None else f"{percent(less)} less time"
        case Fate.KEPT if margin is None:
            return "kept SGLang's row: nothing faster was found"
        case Fate.KEPT:
            return f"kept SGLang's row: gain within noise ({percent(margin or 0.0)})"
        case Fate.CURED:
            need = max((size for size in own_shared if size is not None), default=0)
            return f"SGLang's own does not {f'fit: {need} of {limit} bytes' if need > limit else 'run on this card'}"
        case Fate.UNJUDGED:
            return "kept SGLang's row: it could not be timed"
    return "fits the card; not measured"


# --- the answer ------------------------------------------------------------------------------------------------------


def _headline(artefact: Artefact, rows: tuple[Row, ...], less: float | None) -> tuple[Worth, str]:
    if not artefact.measured:
        return Worth.NOT_MEASURED, "Not measured: chosen because it fits this card"
    fates = {row.fate for row in rows}
    layer = all(None not in row.choice.layer_times for row in rows if row.less is not None)
    family = artefact.family
    saved = f"{percent(less or 0.0)} less time in the {family.layer if layer else family.kernels} on average"
    if Fate.FASTER in fates and less is not None and less >= LEAST_GAIN:
        if Fate.CURED in fates:
            return Worth.CURED, f"The crash is fixed, and the other rows take {saved}"
        return Worth.FASTER, saved
    return Worth.NEUTRAL, f"Neutral: {_neutral(fates, saved)}"


def _neutral(fates: set[Fate], saved: str) -> str:
    if Fate.CURED in fates:
        return "only the crash is fixed"
    if Fate.FASTER in fates:
        return saved
    if Fate.KEPT in fates:
        return "SGLang's own configuration was already as good"
    return "SGLang's own configuration was kept, for it could not be timed"


def _changed(rows: tuple[Row, ...], best: Row | None) -> str:
    of = {fate: [row.batch for row in rows if row.fate is fate] for fate in Fate}
    parts = []
    if of[Fate.FASTER]:
        parts.append(f"{len(of[Fate.FASTER])} of {len(rows)} batch sizes got a faster configuration")
    if of[Fate.CURED]:
        parts.append(f"at M = {_listed(of[Fate.CURED])} SGLang's own does not run on this card, and this one does")
    kept = len(of[Fate.KEPT]) + len(of[Fate.UNJUDGED])
    if kept:
        alone = "all" if kept == len(rows) else str(kept)
        parts.append(f"{alone} {'keeps' if kept == 1 else 'keep'} SGLang's own")
    if of[Fate.UNMEASURED]:
        parts.append(f"{len(of[Fate.UNMEASURED])} batch sizes got a configuration that fits, compiled and not measured")
    text = "; ".join(parts)
    text = text[:1].upper() + text[1:] + "."
    if best is None:
        return text
    bounds = f" ({best.bounds})" if best.bounds else ""
    return f"{text} The largest gain is {percent(best.less or 0.0)}{bounds}, at M = {best.batch}."


def _listed(batches: list[int], most: int = 6) -> str:
    shown = ", ".join(map(str, batches[:most]))
    return shown + (f" and {len(batches) - most} more" if len(batches) > most else "")
