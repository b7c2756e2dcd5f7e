"""`moefix bake`."""

from __future__ import annotations

from pathlib import Path

import click

from fixer.commands.common import PASS_THROUGH
from fixer.machine.signals import interruptible


@click.command("bake", context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", required=True, help="A folder, or OWNER/NAME.")
@click.option("--tag", metavar="NAME", required=True, help="The new image's name: me/qwen3:rtx4090.")
@click.option("--gpus", default="all", show_default=True, help="Cards to tune on, as docker run takes them.")
@click.option("--for", "planned_for", metavar="CARD", help='Bake the plan for that card ("RTX 4090"): no GPU needed.')
@click.option("--artefact", metavar="FILE", type=click.Path(path_type=Path), help="Bake what `moefix export` wrote.")
@click.option("--with-weights", is_flag=True, help="Put the weights into the image.")
@click.option("--revision", metavar="REV", help="The model's revision on the hub.")
@click.option("--image", metavar="NAME", default="moefix", show_default=True, help="The moefix image to build on.")
@click.option("--data", "volume", metavar="VOLUME", default="", help="A named volume that keeps what tuning measures.")
@click.option("--force", is_flag=True, help="Take the tag even if an image has it.")
@click.option("--quiet", is_flag=True, help="Errors and the result only.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def command(
    *,
    model: str,
    tag: str,
    gpus: str,
    planned_for: str | None,
    artefact: Path | None,
    with_weights: bool,
    revision: str | None,
    image: str,
    volume: str,
    force: bool,
    quiet: bool,
    sglang_flags: tuple[str, ...],
) -> None:
    """Build an image that is tuned for one model and one kind of card, and serves it without any arguments.

    A container of the moefix image tunes on the cards of this machine. All other options are SGLang's own; they become
    the image's defaults. HF_TOKEN is passed to that container only.
    """
    from fixer.artefacts.transfer import describe
    from fixer.base.progress import terminal_progress
    from fixer.image.bake import bake, how_to_start
    from fixer.image.order import Order, parse_gpus

    order = Order(
        model=model,
        tag=tag,
        flags=sglang_flags,
        image=image,
        gpus=parse_gpus(gpus),
        planned_for=planned_for,
        artefact=artefact,
        with_weights=with_weights,
        revision=revision,
        volume=volume,
        force=force,
    )
    with interruptible(at_most=None):
        with terminal_progress(quiet=quiet) as progress:
            baked = bake(order, progress)
        for one in baked.recipe.artefacts:
            click.echo(f"{tag}: {describe(one)}")
        click.echo(how_to_start(order))
