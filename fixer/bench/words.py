"""What a result says, in words: for the terminal and for the report alike."""

from __future__ import annotations

import math

from fixer.bench.passes import Interval
from fixer.bench.results import BenchResult, Kind, ServeLoad, Verdict

_NUMBERS = {1: "one start", 2: "two starts", 3: "three starts"}


def headline(result: BenchResult) -> str:
    """One line that says what came out: "the server: neutral (+0.4 % over all loads, -0.6 to +1.4 %)"."""
    what = "the server" if result.kind is Kind.SERVE else "SGLang's MoE layer"
    match result.verdict:
        case Verdict.CURED:
            return f"{what}: runs only tuned"
        case Verdict.SAME:
            return f"{what}: same configuration on both sides under every load"
        case Verdict.UNDECIDED:
            return f"{what}: {verdict_words(next(load for load in result.serve if not load.same))}"
    if result.verdict is None or result.ratio is None or result.interval is None:
        return f"{what}: nothing to compare yet"
    by = f"{change(result.ratio)} over all {'loads' if result.kind is Kind.SERVE else 'rows'}, {span(result.interval)}"
    if result.verdict is Verdict.NEUTRAL:
        verdicts = {load.verdict for load in result.serve} | {row.verdict for row in result.rows}
        split = verdicts >= {Verdict.FASTER, Verdict.SLOWER}
        return f"{what}: neutral ({by}{'; some faster, some slower' if split else ''})"
    more = "; more than the MoE layer can give" if exceeds(result.ratio, result.most) else ""
    return f"{what}: {result.verdict.value} with the tuned configuration ({by}{more})"


def verdict_words(load: ServeLoad) -> str:
    """A load's verdict: "faster", "not decided (one start each)", "-" before there is one."""
    if load.verdict is Verdict.UNDECIDED:
        own, tuned = len(load.sglang.by_start), len(load.tuned.by_start)
        starts = f"{_NUMBERS.get(own, f'{own} starts')} each" if own == tuned else f"{own} and {tuned} starts"
        return f"{load.verdict.value} ({starts})"
    return load.verdict.value if load.verdict else "-"


def cautions(result: BenchResult) -> tuple[str, ...]:
    """What must not be laid to the tuning, one sentence each."""
    loads = [load for load in result.serve if load.ratio is not None]
    above = [load for load in loads if not load.same and exceeds(load.ratio, load.most)]
    same = [load for load in loads if load.same]
    said = []
    if above:
        each = "; ".join(f"{load.load.name}: {change(load.ratio)} of {change(load.most)}" for load in above)
        said.append(f"More than the MoE layer's own gain can give, so something else differs too ({each}).")
    if same:
        each = "; ".join(f"{load.load.name}: {change(load.ratio)}" for load in same)
        said.append(f"Both sides run the same configuration here, so this is no effect of the tuning ({each}).")
    return tuple(said)


def exceeds(ratio: float | None, most: float | None) -> bool:
    """Whether a ratio is above the one that the MoE layer alone would have."""
    return ratio is not None and most is not None and ratio > most


def change(ratio: float | None) -> str:
    """A ratio as a change in per cent: "+2.3 %"."""
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def span(interval: Interval | None) -> str:
    """An interval of a ratio as changes in per cent: "+1.1 to +3.5 %"."""
    return "-" if interval is None else f"{100 * (interval[0] - 1):+.1f} to {100 * (interval[1] - 1):+.1f} %"


def rate(value: float | None) -> str:
    """Tokens a second with five digits, so that a change is the quotient of what is printed: "2932.1", "36099"."""
    return "-" if value is None else f"{value:.{max(0, 4 - math.floor(math.log10(value)))}f}"
