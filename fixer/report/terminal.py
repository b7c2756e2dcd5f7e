"""The report's short form: the page's numbers as lines and one table."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fixer.base.console import plain_or_terminal
from fixer.bench.results import Kind
from fixer.bench.words import headline
from fixer.report.page import when
from fixer.report.summary import Fate, Summary, Worth, microseconds, percent

_STYLES = {Worth.FASTER: "bold green", Worth.CURED: "bold green", Worth.NEUTRAL: "bold", Worth.NOT_MEASURED: "yellow"}
_FATES = {Fate.FASTER: "green", Fate.CURED: "green", Fate.KEPT: "", Fate.UNJUDGED: "", Fate.UNMEASURED: "yellow"}


def print_report(summary: Summary, console: Console | None = None) -> None:
    """Print the headline, what it holds for, one line a row, and what is missing.

    Args:
        console: where to; None for stdout.
    """
    console = console or plain_or_terminal()
    console.print(Text(summary.headline, style=_STYLES[summary.worth]))
    if summary.limit:
        console.print(Text(f"with {summary.limit}, as a smaller card has"))
    console.print(Text(summary.changed))
    console.print()
    for name, value in _heading(summary):
        console.print(Text.assemble((f"{name:<9}", "bold"), value))
    console.print()
    console.print(_table(summary, framed=console.is_terminal))
    for note in (*summary.artefact.notes, *summary.evidence.notes, *summary.evidence.missing.values()):
        console.print(Text.assemble(("note     ", "bold"), note))


def _heading(summary: Summary) -> list[tuple[str, str]]:
    artefact, environment = summary.artefact, summary.artefact.environment
    capability = "{}.{}".format(*environment.capability)
    benches = [summary.evidence.bench[kind] for kind in Kind if kind in summary.evidence.bench]
    return [
        ("model", summary.model),
        ("card", f"{environment.card}, compute capability {capability}, driver {environment.driver}"),
        ("SGLang", f"{environment.sglang} with Triton {environment.triton}"),
        *((("reached", summary.reached),) if summary.reached else ()),
        ("tuned", f"{when(artefact.created)}, in {artefact.seconds:.1f} s"),
        *(("file", name) for name in artefact.files if name),
        *(("bench", headline(result)) for result in benches),
    ]


def _table(summary: Summary, framed: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if framed else None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in ("M", "SGLang's own", "tuned", "less time", "had to clear"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bytes", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    for row in summary.rows:
        tuned_us = row.tuned_us if row.tuned_us is not None else row.choice.layer_us
        table.add_row(
            str(row.batch),
            _or_dash(row.own_us, microseconds),
            _or_dash(tuned_us, microseconds),
            _or_dash(row.less, percent),
            _or_dash(row.margin, percent),
            _bytes(row.shared),
            Text(row.words, style=_FATES[row.fate]),
        )
    return table


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _bytes(shared: tuple[int | None, ...]) -> str:
    sizes = ["-" if size is None else str(size) for size in shared]
    return sizes[0] if len(set(sizes)) == 1 else " / ".join(sizes)
