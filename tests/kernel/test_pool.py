from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError
from fixer.kernel.compile import Candidate, CompileOutcome, Target
from fixer.kernel.pool import AdaptiveDeadline, CompilePool, FixedDeadline, compile_all
from fixer.kernel.source import KernelSource, read_kernel_source
from fixer.machine.processes import usable_cores
from fixer.workload import BOTH, NumberFormat, Projection, Tile, Workload

BF16 = Workload(8, 64, 128, 2)
FP8 = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
QUICK = Candidate(BF16, Projection.GATE_UP, Tile(16, 32, 64, 1, 4, 2))
QUICK_TOO = Candidate(BF16, Projection.DOWN, Tile(16, 32, 64, 1, 4, 2))
SLOW = Candidate(FP8, Projection.GATE_UP, Tile(128, 256, 128, 32, 8, 4))  # a second or more
WRONG = Candidate(BF16, Projection.GATE_UP, Tile(16, 32, 48, 1, 4, 2))  # 48 is no power of two


@pytest.fixture(scope="module")
def target(trees, tmp_path_factory):
    return Target(read_kernel_source(trees["0.5.17"].kernel_source), 89, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@dataclass
class Adjustable:
    """A deadline that a test moves."""

    seconds: float
    observed: int = 0

    def __call__(self) -> float:
        return self.seconds

    def observe(self, seconds: float) -> None:
        self.observed += 1


def workers_of(pool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def running(groups) -> set[int]:
    """The processes of some process groups that still run (a worker leads its own group, ptxas is in it)."""
    alive = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) in groups and state != "Z":
            alive.add(int(stat.parent.name))
    return alive


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_every_candidate_is_compiled_once_and_told_of(target, cache):
    told = []
    with CompilePool(target, cache, workers=2) as pool:
        results = compile_all(pool, [QUICK, WRONG, QUICK, QUICK_TOO], lambda *result: told.append(result))
        assert (pool.busy, pool.poll(1.0), pool.connections) == (0, [], [])
        groups = workers_of(pool)
        assert len(groups) == 2
        assert running(groups) == set(groups)
    assert running(groups) == set()
    assert dict(told) == results
    assert len(told) == 3
    outcomes = {candidate: result.outcome for candidate, result in results.items()}
    assert outcomes == {
        QUICK: CompileOutcome.OK,
        QUICK_TOO: CompileOutcome.OK,
        WRONG: CompileOutcome.FAILED,
    }
    assert results[QUICK].shared_bytes > 0
    assert results[WRONG].message
    assert any(cache.rglob("*.cubin"))


def test_at_a_deadline_the_candidate_dies_and_the_pool_goes_on(target, tmp_path):
    deadline = Adjustable(0.05)
    with CompilePool(target, tmp_path, workers=1, deadline=deadline) as pool:
        pool.submit([SLOW])
        (first,) = workers_of(pool)
        ((candidate, result),) = pool.drain()
        assert (candidate, result.outcome, result.shared_bytes) == (SLOW, CompileOutcome.DEADLINE, 0)
        assert 0.05 <= result.seconds < 1
        assert result.message.startswith("over 0.")
        assert running([first]) == set()
        deadline.seconds = 60
        results = compile_all(pool, [QUICK])
        assert results[QUICK].outcome is CompileOutcome.OK
        assert deadline.observed == 1
        assert first not in workers_of(pool)


def test_a_fixed_deadline_ends_every_slow_candidate(target, tmp_path):
    candidates = [Candidate(FP8, projection, SLOW.tile) for projection in BOTH]
    with CompilePool(target, tmp_path, workers=1, deadline=FixedDeadline(0.05)) as pool:
        results = compile_all(pool, candidates)
    assert {result.outcome for result in results.values()} == {CompileOutcome.DEADLINE}
    assert set(results) == set(candidates)


def test_some_candidates_have_a_deadline_and_a_cache_of_their_own(target, cache, tmp_path):
    own = tmp_path / "own"
    with CompilePool(target, cache, workers=1) as pool:
        pool.submit([SLOW], seconds=0.05)
        pool.submit([QUICK], cache=own)
        results = dict(pool.drain())
    assert results[SLOW].outcome is CompileOutcome.DEADLINE
    assert results[QUICK].outcome is CompileOutcome.OK
    assert len(list(own.rglob("*.cubin"))) == 1


def test_a_worker_killed_from_outside_costs_one_candidate(target, tmp_path):
    with CompilePool(target, tmp_path, workers=1) as pool:
        pool.submit([SLOW, QUICK])
        (victim,) = workers_of(pool)
        os.kill(victim, signal.SIGKILL)
        results = dict(pool.drain())
        groups = [victim, *workers_of(pool)]
    assert results[SLOW].outcome is CompileOutcome.CRASHED
    assert results[SLOW].message == "the compiler died"
    assert results[QUICK].outcome is CompileOutcome.OK
    assert running(groups) == set()


def test_a_worker_that_dies_while_idle_costs_nothing(target, cache):
    with CompilePool(target, cache, workers=1) as pool:
        compile_all(pool, [QUICK])
        (victim,) = workers_of(pool)
        os.kill(victim, signal.SIGKILL)
        assert eventually(pool._workers[0].pipe.poll)  # its end of the pipe is closed
        assert compile_all(pool, [QUICK_TOO])[QUICK_TOO].outcome is CompileOutcome.OK
        assert victim not in workers_of(pool)


def test_closing_in_the_middle_leaves_no_process(target, tmp_path):
    with CompilePool(target, tmp_path, workers=2) as pool:
        pool.submit([SLOW, Candidate(FP8, Projection.DOWN, SLOW.tile), QUICK])
        groups = workers_of(pool)
        assert eventually(lambda: len(running(groups)) >= 2)
        assert pool.busy == 3
    assert running(groups) == set()
    assert pool.busy == 0


OWNER = """
import sys, time
from pathlib import Path
from fixer.kernel.pool import CompilePool
from fixer.kernel.compile import Candidate, Target; from fixer.kernel.source import read_kernel_source
from fixer.workload import BOTH, Tile, Workload

if __name__ == "__main__":
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    pool = CompilePool(Target(read_kernel_source(source), 89, folder), folder / "cache", workers=2)
    workload = Workload(8, 64, 128, 2)
    pool.submit(Candidate(workload, projection, Tile(128, 128, 64, 1, 4, 3)) for projection in BOTH)
    print(*[worker.process.pid for worker in pool._workers], flush=True)
    time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_owner(target, tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, str(script), str(target.source.path), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}) as owner:
        groups = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(groups) == 2
        assert eventually(lambda: running(groups) == set(groups))
        owner.kill()
    assert eventually(lambda: running(groups) == set(), 20)


def test_a_kernel_that_moefix_does_not_know_ends_the_run(target, tmp_path):
    text = target.source.text.replace(
        "    even_Ks: tl.constexpr,", "    NEW_SWITCH: tl.constexpr,\n    even_Ks: tl.constexpr,"
    )
    unknown = KernelSource(target.source.path, text, hashlib.sha256(text.encode()).hexdigest())
    with CompilePool(Target(unknown, 89, tmp_path), tmp_path / "cache", workers=1) as pool:
        groups = workers_of(pool)
        with pytest.raises(SGLangError, match="NEW_SWITCH") as caught:
            compile_all(pool, [QUICK])
    assert caught.value.hint
    assert running(groups) == set()


def test_the_deadline_adapts_to_the_machine():
    deadline = AdaptiveDeadline(first=20.0, factor=6.0, least=2.0, enough=3)
    assert deadline() == 20.0
    deadline.observe(1.0)
    deadline.observe(1.0)
    assert deadline() == 20.0  # too few to tell
    deadline.observe(100.0)
    assert deadline() == 6.0  # six medians: one slow candidate does not count
    for _ in range(10):
        deadline.observe(0.01)
    assert deadline() == 6.0  # those came from Triton's cache
    for _ in range(10):
        deadline.observe(0.2)
    assert deadline() == 2.0
    for _ in range(50):
        deadline.observe(50.0)
    assert deadline() == 20.0


def test_a_fixed_deadline_learns_nothing():
    deadline = FixedDeadline(7.0)
    deadline.observe(0.001)
    assert deadline() == 7.0


def test_usable_cores_are_those_of_this_process():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
