"""What is compiled is kept, under all that it depends on; nothing that happens to the file is a failure."""

import dataclasses
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fixer.kernel.cache
from fixer.base.errors import CompileError
from fixer.kernel.cache import FILE_NAME, CompileCache, candidate_key, compile_with_cache, is_lasting
from fixer.kernel.compile import Candidate, Compiled, CompileOutcome, Target
from fixer.kernel.source import KernelSource, read_kernel_source
from fixer.sglang.tree import Tree
from fixer.workload import NumberFormat, Projection, Tile, Workload

WORKLOAD = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)
TILE = Tile(16, 32, 64, 1)
CANDIDATE = Candidate(WORKLOAD, Projection.GATE_UP, TILE)
OK = Compiled(CompileOutcome.OK, 3072, 0.5)
FAILED = Compiled(CompileOutcome.FAILED, 0, 0.25, "CompilationError: at 3:1")


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(KernelSource(tmp_path / "kernels.py", "text", "a" * 64), 89, tmp_path)


def other_tile(number: int) -> Candidate:
    return dataclasses.replace(CANDIDATE, tile=Tile(16, 32, 64, number))


class Pool:
    """Stands in for the compile pool: counts, and answers at once."""

    compiled: ClassVar[list[Candidate]] = []
    outcome = OK

    def __init__(self, *_: Any) -> None:
        self._waiting: list[Candidate] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, candidates: Iterable[Candidate]) -> None:
        self._waiting = list(candidates)

    def drain(self) -> Iterable[tuple[Candidate, Compiled]]:
        for candidate in self._waiting:
            Pool.compiled.append(candidate)
            yield candidate, Pool.outcome


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[Pool]:
    Pool.compiled, Pool.outcome = [], OK
    monkeypatch.setattr(fixer.kernel.cache, "CompilePool", Pool)
    return Pool


def test_what_is_kept_is_found_by_another_process(target: Target, tmp_path: Path) -> None:
    with CompileCache(tmp_path) as cache:
        assert cache.keeps
        assert cache.find(target, [CANDIDATE]) == {}
        cache.keep(target, {CANDIDATE: OK, other_tile(2): FAILED})
    with CompileCache(tmp_path) as cache:
        assert cache.find(target, [CANDIDATE, other_tile(2), other_tile(3)]) == {CANDIDATE: OK, other_tile(2): FAILED}


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(CANDIDATE, projection=Projection.DOWN),
        dataclasses.replace(CANDIDATE, tokens=16),
        dataclasses.replace(CANDIDATE, tile=dataclasses.replace(TILE, use_tma=True)),
        dataclasses.replace(CANDIDATE, tile=dataclasses.replace(TILE, num_stages=4)),
        dataclasses.replace(CANDIDATE, workload=dataclasses.replace(WORKLOAD, hidden_size=4096)),
        dataclasses.replace(CANDIDATE, workload=dataclasses.replace(WORKLOAD, number_format=NumberFormat.NONE)),
        dataclasses.replace(CANDIDATE, workload=dataclasses.replace(WORKLOAD, block_shape=(128, 128))),
    ],
)
def test_another_candidate_has_another_key(target: Target, other: Candidate) -> None:
    assert candidate_key(target, other) != candidate_key(target, CANDIDATE)


def test_kernel_architecture_triton_and_arguments_are_in_the_key(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = candidate_key(target, CANDIDATE)
    newer = dataclasses.replace(target, source=dataclasses.replace(target.source, sha256="b" * 64))
    keys = {key, candidate_key(newer, CANDIDATE), candidate_key(dataclasses.replace(target, arch=90), CANDIDATE)}
    monkeypatch.setattr(fixer.kernel.cache, "triton_version", lambda: "9.9.9")
    keys.add(candidate_key(target, CANDIDATE))
    monkeypatch.setattr(fixer.kernel.cache, "_arguments_hash", lambda: "other")
    keys.add(candidate_key(target, CANDIDATE))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("compiled", "lasts"),
    [
        (OK, True),
        (FAILED, True),
        (Compiled(CompileOutcome.FAILED, message="AssertionError: "), True),
        (Compiled(CompileOutcome.FAILED, message="OSError: [Errno 28] No space left on device"), False),
        (Compiled(CompileOutcome.FAILED, message="FileNotFoundError: ptxas"), False),
        (Compiled(CompileOutcome.FAILED, message="MemoryError"), False),
        (Compiled(CompileOutcome.DEADLINE, message="over 20.0 s"), False),
        (Compiled(CompileOutcome.CRASHED), False),
    ],
)
def test_only_what_would_be_the_same_again_lasts(
    target: Target, tmp_path: Path, compiled: Compiled, lasts: bool
) -> None:
    assert is_lasting(compiled) is lasts
    with CompileCache(tmp_path) as cache:
        cache.keep(target, {CANDIDATE: compiled})
        assert cache.find(target, [CANDIDATE]) == ({CANDIDATE: compiled} if lasts else {})


def test_only_what_is_missing_is_compiled(target: Target, tmp_path: Path, pool: type[Pool]) -> None:
    news: list[Candidate] = []
    with CompileCache(tmp_path) as cache:
        cache.keep(target, {CANDIDATE: FAILED})
        results = compile_with_cache(
            target,
            [other_tile(2), CANDIDATE, other_tile(2)],
            cache,
            tmp_path,
            on_result=lambda candidate, _: news.append(candidate),
        )
        assert results == {other_tile(2): OK, CANDIDATE: FAILED}
        assert pool.compiled == [other_tile(2)] == news
        compile_with_cache(target, [CANDIDATE, other_tile(2)], cache, tmp_path)
        assert pool.compiled == [other_tile(2)]


def test_nothing_wanted_is_nothing_done(target: Target, tmp_path: Path, pool: type[Pool]) -> None:
    with CompileCache(None) as cache:
        assert compile_with_cache(target, [], cache, tmp_path) == {}
        assert not cache.keeps


def test_a_crash_is_not_kept(target: Target, tmp_path: Path, pool: type[Pool]) -> None:
    pool.outcome = Compiled(CompileOutcome.CRASHED)
    with CompileCache(tmp_path) as cache:
        for _ in range(2):
            assert compile_with_cache(target, [CANDIDATE], cache, tmp_path)[CANDIDATE].outcome is CompileOutcome.CRASHED
    assert len(pool.compiled) == 2


@pytest.mark.parametrize("folder", ["missing", "a file"])
def test_without_a_folder_there_is_no_cache(target: Target, tmp_path: Path, pool: type[Pool], folder: str) -> None:
    (tmp_path / "a file").write_text("")
    with CompileCache(tmp_path / folder) as cache:
        assert not cache.keeps
        assert compile_with_cache(target, [CANDIDATE], cache, tmp_path) == {CANDIDATE: OK}
        assert cache.damaged == ()


def test_a_file_that_cannot_be_written_is_still_read(target: Target, tmp_path: Path, pool: type[Pool]) -> None:
    with CompileCache(tmp_path) as cache:
        cache.keep(target, {CANDIDATE: OK})
    with CompileCache(tmp_path) as cache:
        assert cache._connection is not None
        cache._connection.execute("PRAGMA query_only = ON")  # what a read-only volume does, for root too
        assert set(compile_with_cache(target, [CANDIDATE, other_tile(2)], cache, tmp_path)) == {
            CANDIDATE,
            other_tile(2),
        }
        assert pool.compiled == [other_tile(2)]
        assert cache.damaged == ()


def test_a_locked_file_is_not_waited_for_long(
    target: Target, tmp_path: Path, pool: type[Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixer.kernel.cache, "_PATIENCE_SECONDS", 0.05)
    with CompileCache(tmp_path) as cache:
        cache.keep(target, {CANDIDATE: OK})
    holder = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with CompileCache(tmp_path) as cache:
            assert compile_with_cache(target, [CANDIDATE], cache, tmp_path) == {CANDIDATE: OK}
        assert cache.damaged == ()
    finally:
        holder.close()
    with CompileCache(tmp_path) as cache:
        assert cache.find(target, [CANDIDATE]) == {CANDIDATE: OK}


def damage_start(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


def damage_middle(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))


def damage_table(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE compiled (something TEXT)")
    connection.close()


@pytest.mark.parametrize("damage", [damage_start, damage_middle, damage_table])
def test_a_damaged_file_is_set_aside_and_begun_anew(target: Target, tmp_path: Path, damage: Any) -> None:
    with CompileCache(tmp_path) as cache:
        cache.keep(target, {other_tile(number): OK for number in range(1, 200)})
    damage(tmp_path / FILE_NAME)
    (tmp_path / f"{FILE_NAME}-journal").write_bytes(b"old")
    with CompileCache(tmp_path) as cache:
        cache.find(target, [CANDIDATE])
        assert cache.damaged[0].kept_as is not None
        assert cache.damaged[0].kept_as.exists()
        assert not (tmp_path / f"{FILE_NAME}-journal").exists()
        cache.keep(target, {CANDIDATE: OK})
    with CompileCache(tmp_path) as cache:
        assert cache.find(target, [CANDIDATE]) == {CANDIDATE: OK}
        assert cache.damaged == ()


values = st.one_of(st.none(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=9), st.binary(max_size=9))


@settings(max_examples=60, deadline=None)
@given(row=st.tuples(values, values, values, values))
def test_a_row_of_other_types_is_not_used(row: tuple[Any, ...]) -> None:
    result = fixer.kernel.cache._compiled(row)
    assert result is None or (result.outcome in (CompileOutcome.OK, CompileOutcome.FAILED) and result.shared_bytes >= 0)


def test_without_triton_it_is_said(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixer.kernel.cache, "_TRITON_PACKAGES", ("no-such-package",))
    fixer.kernel.cache.triton_version.cache_clear()
    try:
        with CompileCache(tmp_path) as cache, pytest.raises(CompileError, match="not installed"):
            compile_with_cache(target, [CANDIDATE], cache, tmp_path)
    finally:
        fixer.kernel.cache.triton_version.cache_clear()


def test_real_kernels_are_compiled_once(trees: dict[str, Tree], tmp_path: Path) -> None:
    target = Target(read_kernel_source(trees["0.5.17"].kernel_source), 89, tmp_path / "kernels")
    known: list[Candidate] = []
    with CompileCache(tmp_path) as cache:
        for _ in range(2):
            results = compile_with_cache(
                target, [CANDIDATE], cache, tmp_path / "triton", workers=1, on_result=lambda one, _: known.append(one)
            )
            assert results[CANDIDATE].outcome is CompileOutcome.OK
            assert results[CANDIDATE].shared_bytes == 6144
    assert known == [CANDIDATE]
