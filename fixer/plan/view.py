"""A plan for people: colours and a framed table on a terminal, plain lines anywhere else."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fixer.base.console import plain_or_terminal
from fixer.plan.plan import Plan, PlanRow, Use, Verdict
from fixer.workload import RowTiles, Tile

_STYLES = {
    Verdict.FITS: "green",
    Verdict.OUT_OF_RESOURCES: "red",
    Verdict.COMPILER_CRASHED: "red",
    Verdict.NOT_APPLICABLE: "yellow",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: model, card, SGLang, outcome, file names, one line a row, verdict.

    Args:
        console: where to; None for stdout.
    """
    console = console or plain_or_terminal()
    for name, value in _heading(plan):
        console.print(Text(f"{name:<9}", style="bold") + Text(value))
    if plan.rows:
        console.print()
        console.print(_table(plan, framed=console.is_terminal))
    console.print()
    console.print(Text("verdict  ", style="bold") + Text(verdict_line(plan), style=_STYLES[plan.verdict]))
    for note in plan.notes:
        console.print(Text("note     ", style="bold") + Text(note))


def _heading(plan: Plan) -> list[tuple[str, str]]:
    card, decision, workload = plan.card, plan.decision, plan.decision.workload
    capability = "{}.{}".format(*card.capability)
    lines = [
        ("model", f"{plan.model.name} ({plan.model.architecture})"),
        ("card", f"{card.name}, compute capability {capability}, {card.shared_memory} bytes of shared memory a block"),
        ("SGLang", f"{plan.sglang_version} with Triton {plan.triton}"),
        ("outcome", f"{decision.outcome.value}: {decision.reason}"),
    ]
    if decision.kernel != "none":
        lines.append(("kernel", decision.kernel))
    if workload is not None:
        shape = f"E={workload.experts} N={workload.intermediate} hidden={workload.hidden_size} top-k={workload.top_k}"
        lines.append(("layer", f"{shape} {workload.number_format.value}, tp={workload.tp_size} ep={workload.ep_size}"))
    if plan.lookup is not None:
        lines.append(("looks in", f"{plan.lookup.folder} (found: {plan.lookup.found.value})"))
        lines += [("file", name) for name in (plan.lookup.gate_up, plan.lookup.down) if name]
    return lines


def _table(plan: Plan, framed: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if framed else None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in ("M", "bytes", "fits"):
        table.add_column(heading, justify="right" if heading != "fits" else "left", no_wrap=True)
    table.add_column("SGLang's own", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("proposed", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            str(row.tokens),
            _bytes(row),
            _fits(row),
            Text(_tiles(row.gate_up.tile, row.down.tile)),
            row.source.value,
            Text(_proposed(row.proposed, row)),
        )
    return table


def _bytes(row: PlanRow) -> str:
    up, down = _use_bytes(row.gate_up), _use_bytes(row.down)
    return up if up == down else f"{up} / {down}"


def _use_bytes(use: Use) -> str:
    if use.fits is None:
        return "crashed" if use.crashed else "-"
    return "no compile" if use.shared_bytes is None else str(use.shared_bytes)


def _fits(row: PlanRow) -> Text:
    if row.fits is None:
        return Text("?" if row.crash else "-")
    return Text("yes", style="green") if row.fits else Text("NO", style="bold red")


def _tiles(gate_up: Tile, down: Tile) -> str:
    return str(gate_up) if gate_up == down else f"{gate_up} / {down}"


def _proposed(pair: RowTiles | None, row: PlanRow) -> str:
    if pair is None:
        return "-"
    if (pair.gate_up, pair.down) == (row.gate_up.tile, row.down.tile):
        return "SGLang's own"
    return _tiles(pair.gate_up, pair.down)


def verdict_line(plan: Plan) -> str:
    """The verdict with what it rests on, in one line."""
    limit = plan.card.shared_memory
    if plan.verdict is Verdict.FITS:
        return f"fits: SGLang's own configurations need at most {_most_bytes(plan)} of {limit} bytes"
    if plan.verdict is Verdict.OUT_OF_RESOURCES:
        rows = ", ".join(str(row.tokens) for row in plan.rows if row.fits is False)
        need = f"needs {_most_bytes(plan)} bytes" if _most_bytes(plan) > limit else "does not compile"
        return f"out_of_resources: at M = {rows} SGLang's own {need}, and the card has {limit}"
    if plan.verdict is Verdict.COMPILER_CRASHED:
        rows = ", ".join(str(row.tokens) for row in plan.rows if row.crash)
        return f"compiler_crashed: whether SGLang's own fits at M = {rows} is not known ({plan.crash})"
    return "not_applicable: nothing was compiled" if plan.rows else f"not_applicable: {plan.decision.outcome.value}"


def _most_bytes(plan: Plan) -> int:
    return max(use.shared_bytes or 0 for row in plan.rows for use in (row.gate_up, row.down))
