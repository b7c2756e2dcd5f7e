"""Compile many candidates at once, in processes that import Triton only and that can be killed at a deadline."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target, compile_candidate, planning_driver
from fixer.machine.processes import usable_cores
from fixer.machine.signals import settle_child, starting

FROM_CACHE_SECONDS = 0.1
"""Quicker than any compilation."""


@dataclass(frozen=True)
class FixedDeadline:
    """The same time for every candidate, in seconds."""

    seconds: float = 120.0

    def __call__(self) -> float:
        """Seconds that the next candidate may take."""
        return self.seconds

    def observe(self, seconds: float) -> None:
        """A fixed deadline learns nothing."""


@dataclass
class AdaptiveDeadline:
    """A multiple of what candidates usually take on this machine.

    A tenth of the candidates takes two thirds of all compile time and none of them is ever chosen (facts: H100, all
    3584 kernels), so a candidate that takes many times the median is not worth its wait.

    Attributes:
        first: seconds allowed while fewer than `enough` candidates are known.
        factor: multiple of the median after that.
        least: never less than this, in seconds.
    """

    first: float = 20.0
    factor: float = 8.0
    least: float = 4.0
    enough: int = 12
    _seconds: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        """Seconds that the next candidate may take, from what is known so far."""
        if len(self._seconds) < self.enough:
            return self.first
        return min(self.first, max(self.least, self.factor * statistics.median(self._seconds)))

    def observe(self, seconds: float) -> None:
        """Learn from a candidate that compiled; one that Triton's cache had says nothing."""
        if seconds > FROM_CACHE_SECONDS:
            self._seconds.append(seconds)


Deadline = FixedDeadline | AdaptiveDeadline


@dataclass(frozen=True)
class _Work:
    """One candidate, Triton's cache folder for it, and the seconds it may take (None: the pool's deadline)."""

    candidate: Candidate
    cache: Path
    seconds: float | None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    work: _Work | None = None
    started: float = 0.0


class CompilePool:
    """A fixed number of compiling processes; results come in the order in which they are ready.

    Args:
        target: kernel and architecture.
        cache: Triton's cache folder for what is compiled.
        workers: processes; None for one a core.
        deadline: seconds that one candidate may take.
    """

    def __init__(
        self, target: Target, cache: Path, workers: int | None = None, deadline: Deadline | None = None
    ) -> None:
        self._target = target
        self._cache = cache
        self._deadline = deadline or FixedDeadline()
        self._size = workers or usable_cores()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fixer.kernel", "triton.backends.nvidia.compiler", "triton.language"])
        self._workers: list[_Worker] = []
        self._waiting: deque[_Work] = deque()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def busy(self) -> int:
        """Candidates that have no result yet."""
        return len(self._waiting) + sum(worker.work is not None for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Candidates that nobody has begun to compile."""
        return len(self._waiting)

    def submit(self, candidates: Iterable[Candidate], cache: Path | None = None, seconds: float | None = None) -> None:
        """Queue candidates; the ones submitted first are compiled first.

        Args:
            cache: another cache folder of Triton's for these.
            seconds: another deadline for these.
        """
        self._waiting.extend(_Work(candidate, cache or self._cache, seconds) for candidate in candidates)
        self._feed()

    @property
    def connections(self) -> list[Any]:
        """What to wait for besides other connections of one's own (`multiprocessing.connection.wait`)."""
        return [worker.pipe for worker in self._workers if worker.work is not None]

    def poll(self, timeout: float = 0.0) -> list[tuple[Candidate, Compiled]]:
        """The results that are ready, after waiting at most `timeout` seconds for a first one."""
        self._feed()
        busy = [worker for worker in self._workers if worker.work is not None]
        if not busy:
            return []
        now = time.monotonic()
        patience = min(worker.started + self._allowed(worker) - now for worker in busy)
        ready = set(wait([worker.pipe for worker in busy], max(0.0, min(timeout, patience))))
        results = []
        for worker in busy:
            result = self._collect(worker, worker.pipe in ready)
            if result is not None:
                results.append(result)
        self._feed()
        return results

    def drain(self) -> Iterator[tuple[Candidate, Compiled]]:
        """All results, as they come."""
        while self.busy:
            yield from self.poll(timeout=1.0)

    def close(self) -> None:
        """End every process; nothing is left behind."""
        self._waiting.clear()
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()

    def _feed(self) -> None:
        while self._waiting:
            worker = self._idle_worker()
            if worker is None:
                if len(self._workers) >= self._size:
                    return
                worker = self._start()
            worker.work, worker.started = self._waiting.popleft(), time.monotonic()
            try:
                worker.pipe.send(worker.work)
            except OSError:  # it died while idle: the next worker gets the candidate
                self._waiting.appendleft(worker.work)
                self._discard(worker)

    def _idle_worker(self) -> _Worker | None:
        """A worker that waits for work; those that died while idle are taken away."""
        for worker in [worker for worker in self._workers if worker.work is None]:
            if worker.process.is_alive():
                return worker
            self._discard(worker)
        return None

    def _allowed(self, worker: _Worker) -> float:
        """Seconds that a worker's candidate may take."""
        seconds = worker.work.seconds if worker.work is not None else None
        return self._deadline() if seconds is None else seconds

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_compile_for, args=(theirs, self._target), daemon=True, name="moefix-compile"
        )
        worker = _Worker(process, ours)
        with starting():
            process.start()
            self._workers.append(worker)
        theirs.close()
        return worker

    def _collect(self, worker: _Worker, is_ready: bool) -> tuple[Candidate, Compiled] | None:
        assert worker.work is not None
        candidate, seconds = worker.work.candidate, time.monotonic() - worker.started
        if is_ready:
            try:
                compiled = worker.pipe.recv()
            except (EOFError, OSError):
                self._discard(worker)
                return candidate, Compiled(CompileOutcome.CRASHED, seconds=seconds, message="the compiler died")
            worker.work = None
            if isinstance(compiled, Exception):
                raise compiled
            if compiled.outcome is CompileOutcome.OK:
                self._deadline.observe(compiled.seconds)
            return candidate, compiled
        if seconds < self._allowed(worker):
            return None
        self._discard(worker)
        return candidate, Compiled(CompileOutcome.DEADLINE, seconds=seconds, message=f"over {seconds:.1f} s")

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._kill(worker)

    @staticmethod
    def _kill(worker: _Worker) -> None:
        if worker.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # its whole group: ptxas may be running
                os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.kill()
        worker.process.join(5)
        worker.pipe.close()


def end_helpers() -> None:
    """End the processes that multiprocessing keeps for the next worker, so that none outlives an `exec` as a zombie."""
    for helper in (forkserver._forkserver, resource_tracker._resource_tracker):
        with suppress(Exception):  # not part of multiprocessing's promises: at worst a zombie stays
            helper._stop()  # type: ignore[union-attr]


class _NoTorch(MetaPathFinder):
    """Hides PyTorch: Triton imports it where it finds it, for nothing that compiling needs, and that takes seconds."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """No module of that name is to be found.

        Raises:
            ModuleNotFoundError: for PyTorch.
        """
        if fullname == "torch":
            raise ModuleNotFoundError("PyTorch is not for compiling processes", name="torch")


def _compile_for(pipe: Connection, target: Target) -> None:
    """A worker's life: candidates in, results out, until the pipe closes."""
    settle_child()
    silence = os.open(os.devnull, os.O_RDWR)
    sys.meta_path.insert(0, _NoTorch())
    for stream in (0, 1, 2):  # Triton prints the assembly of what ptxas refuses
        os.dup2(silence, stream)
    with planning_driver(target.arch), suppress(EOFError, OSError):
        while True:
            work = pipe.recv()
            os.environ["TRITON_CACHE_DIR"] = str(work.cache)
            try:
                result: Compiled | Exception = compile_candidate(target, work.candidate)
            except Exception as error:
                result = error
            pipe.send(result)


def compile_all(
    pool: CompilePool, candidates: Iterable[Candidate], on_result: Callable[[Candidate, Compiled], None] | None = None
) -> dict[Candidate, Compiled]:
    """Compile candidates, each once, and wait for all."""
    pool.submit(dict.fromkeys(candidates))
    results = {}
    for candidate, compiled in pool.drain():
        results[candidate] = compiled
        if on_result is not None:
            on_result(candidate, compiled)
    return results
