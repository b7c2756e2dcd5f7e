"""A benchmark's result for people: one table, one verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fixer.base.console import plain_or_terminal
from fixer.bench.passes import Latency
from fixer.bench.results import BenchResult, KernelRow, Kind, Side, Verdict
from fixer.bench.words import cautions, change, headline, rate, span, verdict_words

_STYLES: Mapping[Verdict | None, str] = {Verdict.FASTER: "green", Verdict.SLOWER: "red", Verdict.CURED: "green"}


def print_result(result: BenchResult, console: Console | None = None) -> None:
    """Print a result: what was compared, one line for each load or row, the verdict.

    Args:
        console: where to; None for stdout.
    """
    console = console or plain_or_terminal()
    for name, value in _heading(result):
        console.print(Text(f"{name:<9}", style="bold") + Text(value))
    console.print()
    console.print(_serve_table(result, console) if result.kind is Kind.SERVE else _kernel_table(result, console))
    console.print()
    console.print(Text("verdict  ", style="bold") + Text(headline(result), style=_STYLES.get(result.verdict, "")))
    for note in (*cautions(result), *result.notes, *(() if result.complete else ("not complete",))):
        console.print(Text("note     ", style="bold") + Text(note))


def _heading(result: BenchResult) -> list[tuple[str, str]]:
    where = result.environment
    limit = "" if result.smem_limit is None else f", limited to {result.smem_limit} bytes of shared memory a block"
    own = "its own files and defaults" if result.smem_limit is None else "its default for a card with that limit"
    return [
        ("model", result.model),
        ("card", where.card + limit),
        ("SGLang", f"{where.sglang} with Triton {where.triton}; its side: {own}"),
        ("tuned", result.artefact),
    ]


def _table(console: Console, columns: Sequence[str]) -> Table:
    table = Table(box=box.ROUNDED if console.is_terminal else None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right", no_wrap=True)
    return table


def _serve_table(result: BenchResult, console: Console) -> Table:
    columns = (
        "load",
        "tok/s own",
        "tuned",
        "change",
        "95 of 100",
        "first token, ms",
        "between tokens, ms",
        "verdict",
    )
    table = _table(console, columns)
    for load in result.serve:
        own, tuned = load.sglang, load.tuned
        table.add_row(
            load.load.name + (" (tok/s in)" if load.load.is_prefill else ""),
            rate(load.rate(Side.SGLANG)),
            rate(load.rate(Side.TUNED)),
            change(load.ratio),
            span(load.interval),
            f"{_times(own.ttft_ms)} -> {_times(tuned.ttft_ms)}",
            "-" if load.load.is_prefill else f"{_times(own.itl_ms, 2)} -> {_times(tuned.itl_ms, 2)}",
            Text(verdict_words(load), style=_STYLES.get(load.verdict, "")),
        )
    return table


def _times(latency: Latency | None, digits: int = 0) -> str:
    """The median and, in brackets, the 99th percentile."""
    return "-" if latency is None else f"{latency.median:.{digits}f} ({latency.p99:.{digits}f})"


def _kernel_table(result: BenchResult, console: Console) -> Table:
    table = _table(console, ("M", "own, us", "tuned, us", "change", "counts from", "spread", "verdict"))
    for row in result.rows:
        table.add_row(
            str(row.batch),
            _median(row.sglang_us),
            _median(row.tuned_us),
            change(row.ratio),
            f"{100 * row.margin:.1f} %",
            f"{100 * row.spread:.1f} %",
            _row_verdict(row),
        )
    return table


def _median(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f}" if times else "does not run"


def _row_verdict(row: KernelRow) -> Text:
    words = "neutral (the same tiles)" if row.same else row.verdict.value
    return Text(words, style=_STYLES.get(row.verdict, ""))
