"""From the words of `moefix bench` to results that are kept, written and printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from fixer.base.data_folder import data_home
from fixer.base.errors import UsageError
from fixer.base.progress import terminal_progress
from fixer.base.status import Phase
from fixer.base.status_board import Board, new_board, posted
from fixer.base.voice import Voice
from fixer.bench.kernels import DEFAULT_ROUNDS, bench_kernel
from fixer.bench.results import BenchResult
from fixer.bench.schedule import ServePlan
from fixer.bench.session import bench_serve
from fixer.bench.shelf import result_path, save_result
from fixer.bench.subject import Subject, find_subject
from fixer.serve.options import MoefixOptions, split_flags

OWN_LIMIT = "own"
"""In place of a number of bytes: the card's own limit of shared memory."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        words: SGLang's flags, the model among them, and moefix's with their long names (`--moefix-...`).
        limits: of shared memory per block, as words; () for the card's own.
        sglang_root, home, skip_tune, quiet: as in `MoefixOptions`; these count before the long names.
    """

    words: tuple[str, ...]
    limits: tuple[str, ...] = ()
    sglang_root: Path | None = None
    home: Path | None = None
    skip_tune: bool = False
    quiet: bool = False

    def options(self) -> tuple[MoefixOptions, tuple[str, ...]]:
        """moefix's options, and SGLang's flags."""
        given, flags = split_flags(self.words)
        chosen = replace(
            given,
            sglang_root=self.sglang_root or given.sglang_root,
            home=self.home or given.home,
            skip_tune=self.skip_tune or given.skip_tune,
            quiet=self.quiet or given.quiet,
            strict=True,
        )
        return chosen, flags

    def limits_or(self, given: int | None) -> tuple[int | None, ...]:
        """Each limit in bytes, None for the card's own.

        Raises:
            UsageError: one is neither a number nor "own", or comes twice.
        """
        limits = tuple(_limit(word) for word in self.limits) or (given,)
        if len(set(limits)) != len(limits):
            raise UsageError("a --smem-limit comes twice")
        return limits


def _limit(word: str) -> int | None:
    if word == OWN_LIMIT:
        return None
    if not (word.isascii() and word.isdigit() and len(word) <= 9):
        raise UsageError(f"--smem-limit is {word[:40]!r}", f'Write a number of bytes such as 101376, or "{OWN_LIMIT}".')
    return int(word)


@dataclass(frozen=True)
class Output:
    """Where results go besides the data folder: a file (one for each limit, if there are several), and as JSON."""

    file: Path | None
    as_json: bool

    def publish(self, home: Path, result: BenchResult, *, several: bool) -> None:
        """Keep a state of a result.

        Raises:
            StoreError: it cannot be written.
        """
        save_result(result_path(home, result), result)
        if self.file is not None:
            limit = OWN_LIMIT if result.smem_limit is None else str(result.smem_limit)
            name = f"{self.file.stem}-{limit}{self.file.suffix}" if several else self.file.name
            save_result(self.file.absolute().with_name(name), result)

    def show(self, results: Sequence[BenchResult]) -> None:
        """Print the results on standard output."""
        if self.as_json:
            texts = [result.to_json() for result in results]
            click.echo(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]", nl=False)
            return
        from fixer.bench.view import print_result

        for number, result in enumerate(results):
            if number:
                click.echo()
            print_result(result)


def run_kernel(request: Request, rounds: int | None, output: Output) -> None:
    """Kernels, row by row, for each limit.

    Raises:
        MoefixError: there is no artefact, or nothing could be timed.
    """
    options, flags = request.options()
    home = data_home(options.home)
    limits = request.limits_or(options.smem_limit)
    results = []
    with posted(new_board(home)) as board, terminal_progress(quiet=options.quiet) as progress:
        say = Voice(options.quiet, board)
        for limit in limits:
            subject = find_subject(flags, replace(options, smem_limit=limit, skip_tune=True), home, say)
            _tell(board, subject, "the kernels")

            def publish(result: BenchResult) -> None:
                output.publish(home, result, several=len(limits) > 1)

            results.append(bench_kernel(subject, rounds or DEFAULT_ROUNDS, progress, publish))
    output.show(results)


def run_serve(request: Request, plan: ServePlan, output: Output) -> None:
    """Servers under load, for all limits in one go.

    Raises:
        MoefixError: tuning failed, a server did not start, a load was not answered.
    """
    options, flags = request.options()
    home = data_home(options.home)
    limits = request.limits_or(options.smem_limit)
    with posted(new_board(home)) as board:
        say = Voice(options.quiet, board)
        subjects = [find_subject(flags, replace(options, smem_limit=limit), home, say) for limit in limits]
        _tell(board, subjects[0], "servers under load")

        def publish(place: int, result: BenchResult) -> None:
            output.publish(home, result, several=len(limits) > 1)

        with terminal_progress(quiet=options.quiet) as progress:
            results = bench_serve(subjects, flags, plan, say, progress, publish)
    output.show(results)


def _tell(board: Board, subject: Subject, what: str) -> None:
    board.update(
        phase=Phase.BENCHMARKING, detail=what, model=subject.artefact.model, revision=subject.artefact.revision
    )
