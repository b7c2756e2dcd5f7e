"""`moefix tune`: measure on this machine's cards and install, without a server."""

from __future__ import annotations

from pathlib import Path

import click

from fixer.commands.common import PASS_THROUGH, report_after_tuning
from fixer.machine.signals import interruptible


@click.command("tune", context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="A folder, or OWNER/NAME on the hub.")
@click.option("--smem-limit", metavar="BYTES", type=int, help="Tune for less shared memory per block.")
@click.option("--sglang-root", metavar="DIR", type=click.Path(path_type=Path), help="An SGLang tree to tune for.")
@click.option("--fresh", is_flag=True, help="Forget what the journal and an earlier tuning have.")
@click.option("--exhaustive", is_flag=True, help="Time the whole space: minutes, as a yardstick.")
@click.option("--record", metavar="FILE", type=click.Path(path_type=Path), help="Write every time to a .csv.gz.")
@click.option("--json", "as_json", is_flag=True, help="Print the artefact(s) as JSON.")
@click.option("--home", metavar="DIR", type=click.Path(path_type=Path), help="The data folder; default: MOEFIX_HOME.")
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str | None,
    smem_limit: int | None,
    sglang_root: Path | None,
    fresh: bool,
    exhaustive: bool,
    record: Path | None,
    as_json: bool,
    home: Path | None,
    quiet: bool,
    sglang_flags: tuple[str, ...],
) -> None:
    """Measure on the visible cards and install the best files into SGLang's tree, without starting a server.

    All other options are SGLang's own: give those that the server will get (--tp, --quantization, ...).
    """
    from fixer.serve.options import MoefixOptions
    from fixer.serve.serve import tune_only

    named = () if model is None else (f"--model-path={model}",)
    options = MoefixOptions(
        fresh=fresh, smem_limit=smem_limit, home=home, sglang_root=sglang_root, quiet=quiet, strict=True
    )
    with interruptible():
        artefacts = tune_only(
            (*sglang_flags, *named), options, exhaustive=exhaustive, record=record, after_tuning=report_after_tuning
        )
    if as_json:
        texts = [artefact.to_json() for artefact in artefacts]
        click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]", nl=False)
