"""`moefix bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from fixer.commands.common import COMMANDS, PASS_THROUGH
from fixer.machine.signals import interruptible


@click.command("bench", short_help=COMMANDS["bench"], context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="A folder, or OWNER/NAME on the hub.")
@click.option("--serve", is_flag=True, help="Compare whole servers under load, not the kernels alone.")
@click.option("--rounds", metavar="N", type=click.IntRange(1, 50), help="Starts of each server (4), or of timing (3).")
@click.option("--passes", metavar="N", type=click.IntRange(1, 100), help="Passes of each load on each start (2).")
@click.option("--loads", metavar="LIST", help='"1,16,prefill", or STREAMS:INPUT:OUTPUT:REQUESTS, with commas between.')
@click.option("--quick", is_flag=True, help="Shorter loads, and a short warm pass.")
@click.option("--wait", metavar="SECONDS", type=click.FloatRange(1, 86400), default=600, help="For a server (600).")
@click.option(
    "--smem-limit",
    "limits",
    metavar="BYTES",
    multiple=True,
    help='Compare for less shared memory per block; may be repeated, "own" is the card\'s own.',
)
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="An SGLang tree to use.")
@click.option("--skip-tune", is_flag=True, help="With --serve: an error, not a tuning, where none is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (an array for several limits) as JSON.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Also write the JSON there, as it grows.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str | None,
    serve: bool,
    rounds: int | None,
    passes: int | None,
    loads: str | None,
    quick: bool,
    wait: float,
    limits: tuple[str, ...],
    sglang_root: Path | None,
    skip_tune: bool,
    as_json: bool,
    out: Path | None,
    home: Path | None,
    quiet: bool,
    sglang_flags: tuple[str, ...],
) -> None:
    """Time SGLang's own configuration against the tuned one, and say which is faster, or that neither is.

    Without --serve: SGLang's MoE layer, row by row. With it: the server is started with either configuration in turn
    and put under load; fewer than four starts of each decide nothing. All other options are SGLang's own: give those
    that the server gets.
    """
    from fixer.base.errors import UsageError
    from fixer.bench.run import Output, Request, run_kernel, run_serve
    from fixer.bench.schedule import FULL_LOADS, QUICK_LOADS, ServePlan, parse_loads

    if not serve and (passes or loads or quick):
        raise UsageError("--passes, --loads and --quick go with --serve")
    preset = QUICK_LOADS if quick else FULL_LOADS
    plan = ServePlan(loads=parse_loads(loads, preset) if loads is not None else preset, wait_seconds=wait)
    plan = replace(plan, rounds=rounds or plan.rounds, passes=passes or plan.passes, full_warm=not quick)
    named = () if model is None else (f"--model-path={model}",)
    request = Request((*sglang_flags, *named), limits, sglang_root, home, skip_tune, quiet)
    output = Output(out, as_json)
    with interruptible(at_most=None):
        if serve:
            run_serve(request, plan, output)
        else:
            run_kernel(request, rounds, output)
