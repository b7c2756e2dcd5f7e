"""The command line: which commands there are, and how every fault becomes one line and an exit code.

Nothing heavy is imported before a command needs it, so that `moefix --help` and a look-up answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import fixer
from fixer.base.errors import MoefixError, UsageError
from fixer.commands.common import COMMANDS, DEFAULT_COMMAND, shortened

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

BROKEN_PIPE = 1
"""Exit code where the reader of the output went away, as click has it where it notices first."""

SHORT_HELP = f"""\
moefix {fixer.__version__}: tunes SGLang's fused mixture-of-experts kernel for your card.

  moefix plan --model Qwen3-30B-A3B-FP8-dynamic --gpu "RTX 4090"    what SGLang would do, and whether it fits
  moefix tune --model Qwen/Qwen3-30B-A3B-FP8                        measure on this card, install the best
  moefix serve Qwen/Qwen3-30B-A3B-FP8 --port 30000                  the same, then serve: any SGLang flag goes

moefix --help lists the commands, moefix COMMAND --help their options.
"""


class MoefixGroup(click.Group):
    """Commands by name; a first word that is an option starts the default command. Faults become one or two lines."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name, in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fixer.commands.{cmd_name}{'_' if cmd_name == 'import' else ''}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the short help without arguments; put the default command first where none is named."""
        if not args:
            click.echo(SHORT_HELP, nl=False)
            ctx.exit(0)
        own = {spelling for parameter in self.get_params(ctx) for spelling in parameter.opts}
        serves = args[0] not in own if args[0].startswith("-") else _serves(args[0], self.list_commands(ctx))
        return super().parse_args(ctx, [DEFAULT_COMMAND, *args] if serves else args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a flag that SGLang does not have may be a mistyped option of the command itself.

        Raises:
            UsageError: it is; the hint names the option.
        """
        try:
            return super().invoke(ctx)
        except UsageError as fault:
            from fixer.sglang.parser import UnknownFlagError

            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None and isinstance(fault, UnknownFlagError):
                raise fault.or_of([name for each in command.params for name in each.opts]) from None
            raise

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
                f"there is no command {shortened(args[0])}",
                f"Commands: {', '.join(near)}. To serve a model: moefix serve MODEL ...",
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


def _serves(word: str, commands: Sequence[str]) -> bool:
    """Whether a first word that is no option begins a server's command line: a model, `sglang` or `python`."""
    from fixer.sglang.words import starts_sglang

    return word not in commands and ("/" in word or starts_sglang(word))


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


@click.group(cls=MoefixGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fixer.__version__, prog_name="moefix", message="%(prog)s %(version)s")
def main() -> None:
    """Tune SGLang's fused mixture-of-experts kernel for the card in the machine, and serve with it.

    With a model, an option or a command line of SGLang in place of a command, moefix plans, tunes what is not yet
    tuned, and becomes the SGLang server: moefix sglang serve NAME [any SGLang flag]
    """
