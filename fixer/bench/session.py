"""The server under load, with SGLang's own configuration and with the tuned one, started in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fixer.base.data_folder import DataFolder
from fixer.base.errors import SGLangError
from fixer.base.progress import Progress
from fixer.base.voice import Voice
from fixer.bench.batch_sizes import empty_load
from fixer.bench.config_dirs import make_config_dir
from fixer.bench.load_generator import FIRST_ID, run_pass
from fixer.bench.passes import Load
from fixer.bench.results import BenchResult, Kind, Side, Verdict
from fixer.bench.schedule import ServePlan, Start, schedule
from fixer.bench.server import Server, last_lines
from fixer.bench.subject import Subject
from fixer.bench.verdict import judged, judged_whole
from fixer.model.config import Model
from fixer.sglang.declared import declared_of
from fixer.sglang.secrets import plain_flags
from fixer.sglang.server import OUT_OF_SHARED_MEMORY, files_used

SEED = 20261


def bench_serve(
    subjects: Sequence[Subject],
    flags: Sequence[str],
    plan: ServePlan,
    say: Voice,
    progress: Progress,
    publish: Callable[[int, BenchResult], None],
) -> tuple[BenchResult, ...]:
    """Start the servers, put them under load, and compare.

    Args:
        subjects: the comparisons, which share the model and the card.
        flags: the user's SGLang flags.
        publish: gets each new state of a result, with its place.

    Raises:
        MoefixError: a server did not start or did not answer. What was measured before has been published.
    """
    session = _Session(subjects, flags, plan, say, publish)
    starts = schedule(len(subjects), plan.rounds)
    with subjects[0].lock(progress):
        progress.phase("server starts", len(starts))
        for start in starts:
            session.run(start)
            progress.advance(f"{start.side.value}, {subjects[start.subject].name}")
    return session.finish()


class _Session:
    """One run over all starts."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        flags: Sequence[str],
        plan: ServePlan,
        say: Voice,
        publish: Callable[[int, BenchResult], None],
    ) -> None:
        self._subjects, self._plan, self._say, self._publish = subjects, plan, say, publish
        self._flags = plain_flags(flags, declared_of(subjects[0].situation.tree))
        self._broken: set[int] = set()
        self._results = [
            replace(subject.empty_result(Kind.SERVE), serve=tuple(empty_load(subject, load) for load in plan.loads))
            for subject in subjects
        ]

    def finish(self) -> tuple[BenchResult, ...]:
        """The results, complete."""
        for place, result in enumerate(self._results):
            self._update(place, replace(result, complete=True))
        return tuple(self._results)

    def run(self, start: Start) -> None:
        """One start and all its loads, unless an earlier one has shown that this side does not run."""
        if start.subject in self._broken and start.side is Side.SGLANG:
            return
        subject = self._subjects[start.subject]
        folder = DataFolder(subject.home).bench / "configs" / subject.file.removesuffix(".json") / start.side.value
        files = subject.tuned_files if start.side is Side.TUNED else subject.own_files
        own = make_config_dir(folder, subject.situation.tree, files)
        log = self._log(start)
        self._say.line(f"starting the server: {start.side.value}, {subject.name} ({log})")
        began = time.monotonic()
        server = Server(self._flags, folder, log, self._plan.wait_seconds)
        try:
            with server:
                self._say.line(f"healthy after {time.monotonic() - began:.0f} s")
                self._loads(start, server, own)
        except SGLangError as fault:
            self._explain(start, server, fault)

    def _log(self, start: Start) -> Path:
        subject = self._subjects[start.subject]
        stem = self._results[start.subject].created.replace(":", "").replace("-", "")
        limit = f"-{subject.smem_limit}" if subject.smem_limit is not None else ""
        return DataFolder(subject.home).bench / "logs" / f"{stem}{limit}-{start.number}-{start.side.value}.log"

    def _explain(self, start: Start, server: Server, fault: SGLangError) -> None:
        """A server that did not start or serve ends the run, unless that is what tuning cures.

        Raises:
            SGLangError: the fault itself, after the log's last lines.
        """
        text = server.log_text()
        if start.side is Side.SGLANG and OUT_OF_SHARED_MEMORY.search(text):
            self._broken.add(start.subject)
            result = self._results[start.subject]
            note = "SGLang's own configuration does not run on this card: out of shared memory"
            self._say.warning(note)
            self._results[start.subject] = replace(result, notes=(*result.notes, note))
            return
        for line in last_lines(text):
            self._say.warning(f"| {line}")
        raise SGLangError(
            f"{start.side.value} side: {fault.message}", fault.hint or f"Its log: {server.log}"
        ) from fault

    def _loads(self, start: Start, server: Server, own: Path) -> None:
        ids = vocabulary(self._subjects[start.subject].situation.model)
        for place, load in enumerate(self._plan.loads):
            # What the server does first is slower: kernels are loaded, and compiled where no cache has them.
            short = replace(load, requests=min(load.requests, max(load.streams, 3)))
            run_pass(server.port, load if self._plan.full_warm else short, _seed(load, -1), ids)
            if place == 0:
                self._check_files(start, server, own)
            for turn in range(self._plan.passes):
                passed = run_pass(server.port, load, _seed(load, turn), ids)
                if passed.failed:
                    self._say.warning(f"{load.name}: {passed.failed} requests failed, the first with: {passed.fault}")
                result = self._results[start.subject]
                before = result.serve[place]
                after = judged(before.with_side(start.side, before.side(start.side).plus(start.number, passed)))
                serve = (*result.serve[:place], after, *result.serve[place + 1 :])
                self._update(start.subject, replace(result, serve=serve))

    def _check_files(self, start: Start, server: Server, own: Path) -> None:
        """What SGLang's log says it read is recorded; the tuned side must have read its pair.

        Raises:
            SGLangError: it did not.
        """
        used = files_used(server.log_text())
        files = self._subjects[start.subject].tuned_files
        missing = {own / name for name in files.names if name} - set(used)
        if start.side is Side.TUNED and missing:
            names = ", ".join(sorted(path.name for path in missing))
            raise SGLangError(f"SGLang's log does not say that it read {names}.", f"Its log: {server.log}")
        names_used = tuple(f"{path.parent.name}/{path.name}" for path in used)
        result = self._results[start.subject]
        serve = tuple(
            load.with_side(start.side, replace(load.side(start.side), files=names_used)) for load in result.serve
        )
        self._update(start.subject, replace(result, serve=serve))

    def _update(self, place: int, result: BenchResult) -> None:
        if place in self._broken:
            measured = any(load.tuned.starts for load in result.serve)
            cured = Verdict.CURED if measured else None
            serve = tuple(replace(load, verdict=cured) for load in result.serve)
            result = replace(result, serve=serve, verdict=cured)
        else:
            result = judged_whole(result)
        self._results[place] = result
        self._publish(place, result)


def vocabulary(model: Model) -> int:
    """How many token ids the model knows; a small number where its config does not say."""
    size = model.text_config.get("vocab_size")
    return size if isinstance(size, int) and not isinstance(size, bool) and size > FIRST_ID else 1000


def _seed(load: Load, turn: int) -> int:
    """The prompts' seed: the same for both sides, another for each load and pass."""
    return SEED + 1000 * (turn + 1) + 7 * load.streams + load.input_tokens
