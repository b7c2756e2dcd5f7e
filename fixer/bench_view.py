"""A benchmark's result for people: one table, one verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fixer.base.console import plain_or_terminal
from fixer.bench_results import Arm, BenchResult, KernelRow, Kind, Latency, ServeLoad, Verdict, headline

_STYLES = {Verdict.FASTER: "green", Verdict.SLOWER: "red", Verdict.CURED: "green", Verdict.NEUTRAL: ""}


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
    style = _STYLES[result.verdict] if result.verdict else ""
    console.print(Text("verdict  ", style="bold") + Text(headline(result), style=style))
    for note in (*result.notes, *(() if result.complete else ("not complete",))):
        console.print(Text("note     ", style="bold") + Text(note))


def _heading(result: BenchResult) -> list[tuple[str, str]]:
    where = result.environment
    limit = "" if result.smem_limit is None else f", limited to {result.smem_limit} bytes of shared memory a block"
    own = "its own files and defaults" if result.smem_limit is None else "its default for a card with that limit"
    lines = [
        ("model", result.model),
        ("card", where.card + limit),
        ("SGLang", f"{where.sglang} with Triton {where.triton}; its side: {own}"),
        ("tuned", result.artefact),
    ]
    if result.client:
        lines.append(("load by", result.client))
    return lines


def _table(console: Console, columns: Sequence[str]) -> Table:
    table = Table(box=box.ROUNDED if console.is_terminal else None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right", no_wrap=True)
    return table


def _change(ratio: float | None, margin: float | None) -> tuple[str, str]:
    """A ratio as a change in per cent, and what it has to clear."""
    return (
        "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %",
        "-" if margin is None else f"{100 * margin:.1f} %",
    )


def _verdict_text(verdict: Verdict | None) -> Text:
    return Text("-") if verdict is None else Text(verdict.value, style=_STYLES[verdict])


def _serve_table(result: BenchResult, console: Console) -> Table:
    columns = (
        "load",
        "tok/s own",
        "tuned",
        "change",
        "counts from",
        "first token, ms",
        "between tokens, ms",
        "verdict",
    )
    table = _table(console, columns)
    for load in result.serve:
        change, margin = _change(load.ratio, load.margin)
        own, tuned = load.arms.sglang, load.arms.tuned
        table.add_row(
            load.load.name + (" (tok/s in)" if load.load.is_prefill else ""),
            _speed(load, own),
            _speed(load, tuned),
            change,
            margin,
            f"{_times(own.ttft_ms)} -> {_times(tuned.ttft_ms)}",
            "-" if load.load.is_prefill else f"{_times(own.itl_ms, 2)} -> {_times(tuned.itl_ms, 2)}",
            _verdict_text(load.verdict),
        )
    return table


def _speed(load: ServeLoad, arm: Arm) -> str:
    """Tokens a second, output or, for prefill, input: the median and the range of the passes."""
    if not arm.output_tokens_per_s:
        return "-"
    factor = load.load.input_tokens if load.load.is_prefill else 1
    values = [factor * value for value in arm.output_tokens_per_s]
    middle = statistics.median(values)
    reach = max(max(values) - middle, middle - min(values)) / middle
    return f"{middle:.0f} ± {100 * reach:.1f} %"


def _times(latency: Latency | None, digits: int = 0) -> str:
    """The median and, in brackets, the 99th percentile."""
    return "-" if latency is None else f"{latency.median:.{digits}f} ({latency.p99:.{digits}f})"


def _kernel_table(result: BenchResult, console: Console) -> Table:
    table = _table(console, ("M", "own, us", "tuned, us", "change", "counts from", "spread", "verdict"))
    for row in result.rows:
        change, margin = _change(row.ratio, row.margin)
        table.add_row(
            str(row.batch),
            _median(row.sglang_us),
            _median(row.tuned_us),
            change,
            margin,
            f"{100 * row.spread:.1f} %",
            _row_verdict(row),
        )
    return table


def _median(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f}" if times else "does not run"


def _row_verdict(row: KernelRow) -> Text:
    return Text("neutral (the same tiles)") if row.same else _verdict_text(row.verdict)
