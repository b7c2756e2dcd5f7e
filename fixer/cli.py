"""The command line: `moefix plan`, `tune` and `serve`, where the other commands are, and what becomes of every fault.

Nothing heavy is imported before a command needs it, so that `moefix --help` and a look-up answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import fixer
from fixer.base.errors import CardError, MoefixError, UsageError
from fixer.machine.signals import ENDING

if TYPE_CHECKING:
    from fixer.machine.cards import Card
    from fixer.plan.make_plan import Plan
    from fixer.sglang.tree import Tree

DEFAULT_COMMAND = "serve"
"""Runs where the first word is an option: `moefix --model X [any SGLang flag]`."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

BROKEN_PIPE = 1
"""Exit code where the reader of the output went away, as click has it where it notices first."""

SHORT_HELP = f"""\
moefix {fixer.__version__}: tunes SGLang's fused mixture-of-experts kernel for your card.

  moefix plan --model Qwen3-30B-A3B-FP8-dynamic --gpu "RTX 4090"    what SGLang would do, and whether it fits
  moefix tune --model Qwen/Qwen3-30B-A3B-FP8                        measure on this card, install the best
  moefix --model Qwen/Qwen3-30B-A3B-FP8 --port 30000                the same, then serve: any SGLang flag goes

moefix --help lists the commands, moefix COMMAND --help their options.
"""

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of a command that takes SGLang's flags besides its own."""


ELSEWHERE = {
    "bake": "Build a ready-tuned image for one model and one kind of card.",
    "bench": "Time SGLang's own configurations against the tuned ones.",
    "doctor": "Check this machine for what keeps SGLang or moefix from working.",
    "export": "Write a kept tuning as one file, or as files that SGLang or vLLM reads.",
    "import": "Take a tuning that was exported elsewhere into the data folder.",
    "report": "Write a tuning's report, and print its short form.",
    "status": "Say what a running moefix does.",
}
"""Commands in modules of their own, imported when they are called: `bake` is `command` in fixer/commands/bake.py
(`import` in import_.py). The texts are their short help, so that listing them imports nothing."""


class MoefixGroup(click.Group):
    """Commands by name; a first word that is an option starts the default command. Faults become one or two lines."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name, in alphabetical order."""
        return sorted({*self.commands, *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"fixer.commands.{cmd_name}{'_' if cmd_name == 'import' else ''}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing those that lie elsewhere."""
        with formatter.section("Commands"):
            here = {name: command.get_short_help_str(100) for name, command in self.commands.items()}
            formatter.write_dl(sorted((here | ELSEWHERE).items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the short help without arguments; put the default command first where none is named."""
        if not args:
            click.echo(SHORT_HELP, nl=False)
            ctx.exit(0)
        own = {spelling for parameter in self.get_params(ctx) for spelling in parameter.opts}
        if args[0].startswith("-") and args[0] not in own:
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of that name.

        Raises:
            UsageError: there is none; the hint lists near ones.
        """
        names = self.list_commands(ctx)
        if args[0] not in names:
            near = difflib.get_close_matches(args[0], names, n=3, cutoff=0.5) or names
            raise UsageError(
                f"there is no command {_short(args[0])}",
                f"Commands: {', '.join(near)}. To serve, begin with an option: moefix --model NAME ...",
            )
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and exit: with the command's own code, or with the fault's, told on stderr without a traceback."""
        code = 0
        _open_standard_streams()
        try:
            result = super().main(*args, **{"prog_name": "moefix", **extra, "standalone_mode": False})
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except MoefixError as fault:
            code = _report(fault.message, fault.hint, fault.exit_code)
        except click.ClickException as fault:
            code = _report(fault.format_message(), _usage_hint(fault), fault.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except BrokenPipeError:
            _drop_output()
            code = BROKEN_PIPE
        except OSError as fault:
            where = f"{fault.filename}: " if fault.filename else ""
            code = _report(f"{where}{fault.strerror or fault}", "", MoefixError.exit_code)
        sys.exit(code)


def _report(message: str, hint: str, code: int) -> int:
    # One line each, whatever a file name or a library's text holds.
    for prefix, text in (("moefix: ", message), ("  ", hint)):
        if text:
            click.echo(prefix + " ".join(text.split()), err=True)
    return code


def _usage_hint(fault: click.ClickException) -> str:
    context = fault.ctx if isinstance(fault, click.UsageError) else None
    return f"See {context.command_path} --help." if context is not None else ""


def _open_standard_streams() -> None:
    """Have what was closed (`>&-`) read from and write to nowhere, here and in every process to come.

    Python has None for such a stream, and the next file that is opened would land on its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)


def _drop_output() -> None:
    """Nobody reads any more: what Python still holds goes nowhere, instead of failing once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


@click.group(cls=MoefixGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fixer.__version__, prog_name="moefix", message="%(prog)s %(version)s")
def main() -> None:
    """Tune SGLang's fused mixture-of-experts kernel for the card in the machine, and serve with it.

    With an option in place of a command, moefix plans, tunes what is not yet tuned, and becomes the SGLang server:
    moefix --model NAME [any SGLang flag]
    """


# --- plan ------------------------------------------------------------------------------------------------------------


@main.command(context_settings=PASS_THROUGH)
@click.option("--model", "--model-path", "model", metavar="NAME", help="A folder, or OWNER/NAME on the hub.")
@click.option("--gpu", "gpus", metavar="NAME", multiple=True, help='A card by name ("RTX 4090"); default: those here.')
@click.option("--smem-limit", metavar="BYTES", type=int, help="Plan for less shared memory per block.")
@click.option("--sglang", "version", metavar="VERSION", help="An SGLang release, fetched from PyPI if need be.")
@click.option("--sglang-root", metavar="DIR", help="An SGLang package folder or source checkout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (an array for several cards).")
@click.option("--lookup-only", is_flag=True, help="Stop before compiling: file names and configurations, no bytes.")
@click.option("--write", "folder", metavar="DIR", help="Write the proposed pair of files there.")
@click.option("--home", metavar="DIR", help="The data folder; default: MOEFIX_HOME, else ~/.local/share/moefix.")
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def plan(
    *,
    model: str | None,
    gpus: tuple[str, ...],
    smem_limit: int | None,
    version: str | None,
    sglang_root: str | None,
    as_json: bool,
    lookup_only: bool,
    folder: str | None,
    home: str | None,
    sglang_flags: tuple[str, ...],
) -> None:
    """Say what SGLang would run for a model on a card, whether it fits, and what to run in its place.

    Needs no GPU: the kernel is compiled for the card. All other options are SGLang's own (--tp, --quantization, ...).
    """
    if folder is not None and lookup_only:
        raise UsageError("--write needs compiled configurations", "Leave out --lookup-only.")
    if version is not None and sglang_root is not None:
        raise UsageError("--sglang and --sglang-root exclude each other", "Give one of them.")
    named = () if model is None else (f"--model-path={model}",)
    cards = _cards(gpus, smem_limit)
    with interruptible(), _data_folder(home) as data:
        plans = _plans((*sglang_flags, *named), cards, _tree(sglang_root, version, data), data, lookup_only)
        misfit = next((one for one in plans if one.decision.indivisible), None)
        if as_json or misfit is None:
            _print(plans, as_json)
        if misfit is not None:
            raise UsageError(misfit.decision.reason)
        if folder is not None:
            _write(plans, Path(folder), quiet=as_json)


def _cards(names: tuple[str, ...], limit: int | None) -> list[Card]:
    """The cards to plan for, one of each kind: those named, else those that the driver shows.

    Raises:
        CardError: no such card is known, or none is named and none is visible.
    """
    from fixer.machine.cards import find_card, kinds, visible_cards, with_shared_memory_limit

    cards = [find_card(name) for name in names] or list(visible_cards())
    if not cards:
        raise CardError("no NVIDIA card is visible here", 'Name one to plan for: --gpu "RTX 4090".')
    if limit is not None:
        cards = [with_shared_memory_limit(card, limit) for card in cards]
    return [group[0] for group in kinds(cards)]


@contextlib.contextmanager
def _data_folder(chosen: str | None) -> Iterator[Path]:
    """The data folder; where the default one cannot be written, a passing one, since a plan can do without.

    Raises:
        StoreError: the folder that the user chose cannot be written.
    """
    from fixer.base.errors import StoreError
    from fixer.artefacts.shelf import data_home

    try:
        home = data_home(Path(chosen) if chosen else None)
    except StoreError as fault:
        if chosen:
            raise
        click.echo(f"moefix: {fault.message}; nothing is kept for the next time", err=True)
        with tempfile.TemporaryDirectory(prefix="moefix-") as passing:
            yield Path(passing)
        return
    yield home


@contextlib.contextmanager
def interruptible(at_most: float | None = 1.7) -> Iterator[None]:
    """Have SIGTERM unwind as Ctrl-C does, so that compiling processes and passing folders do not stay behind.

    What unwinds is not disturbed by a second signal. One that was ignored from the start (nohup) stays ignored.

    Args:
        at_most: seconds after which the process ends however far it has unwound: a file system may hang, and Python
            drops what a handler raises while an object is being finalised. What is kept is safe at any moment, and
            children end with their parent. None for work that takes its time to tidy up.
    """

    def leave(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if at_most is not None:
            last = threading.Timer(at_most, os._exit, (128 + number,))
            last.daemon = True
            last.start()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tree(root: str | None, version: str | None, data: Path) -> Tree:
    from fixer.sglang.tree import find_tree

    return find_tree(root, version, data / "cache")


def _plans(argv: Sequence[str], cards: list[Card], tree: Tree, data: Path, lookup_only: bool) -> list[Plan]:
    from fixer.kernel.cache import CompileCache
    from fixer.sglang.flags import parse_flags
    from fixer.model.config import load_model
    from fixer.plan.make_plan import compiler_for, make_plan

    flags = parse_flags(argv)
    model = load_model("", flags)
    if lookup_only:
        return [make_plan(model, flags, card, tree) for card in cards]
    with CompileCache(data) as cache:
        plans = [make_plan(model, flags, card, tree, compiler_for(tree, card, data, cache)) for card in cards]
    for damaged in cache.damaged:
        click.echo(f"moefix: {damaged}", err=True)
    return plans


def _print(plans: list[Plan], as_json: bool) -> None:
    if as_json:
        import json

        objects = [plan.to_json() for plan in plans]
        click.echo(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
        return
    from fixer.plan.view import print_plan

    for number, one in enumerate(plans):
        if number:
            click.echo()
        print_plan(one)


def _write(plans: list[Plan], folder: Path, quiet: bool) -> None:
    from fixer.plan.make_plan import write_plan

    for one in plans:
        for path in write_plan(one, folder):
            click.echo(f"wrote {path}", err=quiet)


# --- tune and serve --------------------------------------------------------------------------------------------------


@main.command(context_settings=PASS_THROUGH)
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
def tune(
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
    from fixer.serve.launch import MoefixOptions
    from fixer.serve.serve import tune_only

    named = () if model is None else (f"--model-path={model}",)
    options = MoefixOptions(
        fresh=fresh, smem_limit=smem_limit, home=home, sglang_root=sglang_root, quiet=quiet, strict=True
    )
    with interruptible():
        artefacts = tune_only((*sglang_flags, *named), options, exhaustive=exhaustive, record=record)
    if as_json:
        texts = [artefact.to_json() for artefact in artefacts]
        click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]", nl=False)


@main.command(DEFAULT_COMMAND, context_settings={**PASS_THROUGH, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]...")
def serve_command(*, arguments: tuple[str, ...]) -> None:
    """Tune what is not yet tuned, then become the SGLang server with exactly these flags.

    moefix's own options: --moefix-skip-tune, --moefix-skip-download, --moefix-fresh, --moefix-strict, --moefix-quiet,
    --moefix-dry-run, --moefix-ask, --moefix-smem-limit BYTES, --moefix-home DIR, --moefix-sglang-root DIR, each also as
    a variable (MOEFIX_HOME ...).
    """
    from fixer.serve.serve import serve

    with interruptible():
        serve(arguments)
