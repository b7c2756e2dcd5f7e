from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixer.base.errors import UsageError
from fixer.machine.cards import find_card
from fixer.sglang.tree import Tree
from fixer.tuning.search.replay import REQUIRED_COLUMNS, Recording, Regret, ReplayRunner
from fixer.tuning.search.runner import Request, run_search
from fixer.tuning.search.search import Search
from fixer.tuning.search.seeds import seeds
from fixer.tuning.search.trials import Outcome
from fixer.workload import BOTH, Kernel, NumberFormat, Projection, Tile, Workload

ROOT = Path(__file__).resolve().parents[3]
LANDSCAPE = ROOT / "benchmarks/recordings/qwen3-30b-a3b-fp8-channel.h100.csv.gz"
QWEN = Workload(128, 768, 2048, 8, NumberFormat.FP8_W8A8, per_channel_quant=True)

Line = dict[str, object]
Writer = Callable[..., Path]


def line(phase: str, tokens: int, tile: Tile, us: float, **more: object) -> Line:
    return {"phase": phase, "M": tokens, **tile.to_json(), "us": us, **more}


SMALL, LARGE = Tile(16, 32, 64, 1, 4, 2), Tile(16, 64, 64, 1, 4, 2)
LINES = [
    line("up", 1, SMALL, 10.0, shared_bytes=100, compile_s=1.5, rough=0),
    line("up", 8, SMALL, 12.0, shared_bytes=100, compile_s=1.5, rough=1),
    line("up", 1, LARGE, 8.0, shared_bytes=200, compile_s=2.0, rough=0),
    line("down", 1, SMALL, 5.0, shared_bytes=100, compile_s=1.0, rough=0),
    line("down", 8, SMALL, 6.0, shared_bytes=100, compile_s=1.0, rough=0),
]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def writer(lines: list[Line], columns: list[str] | None = None, plain: bool = False) -> Path:
        text = io.StringIO()
        out = csv.DictWriter(text, columns or list(lines[0]), extrasaction="ignore", restval="")
        out.writeheader()
        out.writerows(lines)
        path = tmp_path / "recording.csv"
        path.write_bytes(text.getvalue().encode() if plain else gzip.compress(text.getvalue().encode()))
        return path

    return writer


@pytest.mark.parametrize("plain", [False, True])
def test_reading(write: Writer, plain: bool) -> None:
    recording = Recording.read(write(LINES, plain=plain), limit=150)
    assert recording.rows == (1, 8)
    assert recording.projections == BOTH
    assert recording.best(1) == 15.0  # the larger tile is above the limit
    assert Recording.read(write(LINES)).best(1) == 13.0
    small = recording.kernels[Kernel(Projection.GATE_UP, SMALL)]
    assert [small.timings[m].replays for m in (1, 8)] == [3, 1]
    assert small.compile_seconds == 1.5


def test_only_the_required_columns(write: Writer) -> None:
    assert Recording.read(write(LINES, list(REQUIRED_COLUMNS))).best(1) == 13.0


@pytest.mark.parametrize("column", REQUIRED_COLUMNS)
def test_a_missing_column_is_named(write: Writer, column: str) -> None:
    with pytest.raises(UsageError, match=f"lacks the column {column}"):
        Recording.read(write(LINES, [name for name in LINES[0] if name != column]))


def test_a_limit_needs_its_column(write: Writer) -> None:
    with pytest.raises(UsageError, match="lacks the column shared_bytes_sm89"):
        Recording.read(write(LINES), 101376, "shared_bytes_sm89")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"phase": "sideways"}, "line 7: phase is 'sideways'"),
        ({"us": "fast"}, "line 7"),
        ({"us": "nan"}, "not a time"),
        ({"us": "-3"}, "not a time"),
        ({"us": ""}, "line 7"),
        ({"M": "0"}, "M is '0'"),
        ({"BLOCK_SIZE_M": "48"}, "not a power of two"),
        ({"num_warps": "4.0"}, "num_warps is '4.0'"),
        ({"M": "1"}, "is there twice"),
    ],
)
def test_a_damaged_line_is_named(write: Writer, change: Line, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Recording.read(write([*LINES, {**line("up", 16, SMALL, 1.0), **change}]))


def test_damaged_files(write: Writer, tmp_path: Path) -> None:
    whole = LANDSCAPE.read_bytes()
    cut, noise = tmp_path / "cut.csv.gz", tmp_path / "noise.csv.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    noise.write_bytes(whole[:1000] + bytes(range(256)) * 40)
    for path in (cut, noise, tmp_path / "absent.csv.gz"):
        with pytest.raises(UsageError, match="cannot be read"):
            Recording.read(path)
    empty = tmp_path / "empty.csv"
    empty.write_bytes(b"")
    with pytest.raises(UsageError, match="lacks the column"):
        Recording.read(empty)
    with pytest.raises(UsageError, match="no lines"):
        Recording.read(write(LINES[:0] or [], list(LINES[0])))


def test_the_runner(write: Writer) -> None:
    runner = ReplayRunner(Recording.read(write(LINES), limit=150))
    absent_on_grid, off_grid = Tile(16, 64, 64, 1, 4, 2), Tile(16, 64, 64, 8, 4, 2)
    requests = [
        Request(Kernel(Projection.GATE_UP, SMALL), (1, 4, 8)),
        Request(Kernel(Projection.GATE_UP, LARGE), (1,)),
        Request(Kernel(Projection.DOWN, absent_on_grid), (1,)),
        Request(Kernel(Projection.DOWN, off_grid), (1,)),
    ]
    looks = list(runner.look(requests))
    assert [look.build.outcome for look in looks] == [
        Outcome.OK,
        Outcome.TOO_MUCH_SHARED_MEMORY,
        Outcome.TOO_MUCH_SHARED_MEMORY,
        Outcome.COMPILE_ERROR,
    ]
    assert [timing.tokens for timing in looks[0].timings] == [1, 8]  # M = 4 was not recorded
    assert runner.trials == 2
    assert runner.compile_seconds == 3.5  # what does not fit has been compiled too
    assert list(runner.closer([(requests[0].kernel, 1)], 5)) == []


@pytest.fixture(scope="module")
def landscapes() -> dict[int | None, Recording]:
    return {limit: Recording.read(LANDSCAPE, limit, "shared_bytes_sm89") for limit in (None, 101376)}


@pytest.mark.parametrize("shape_known", [True, False])
@pytest.mark.parametrize("limit", [None, 101376])
def test_the_shared_recording(
    trees: dict[str, Tree], landscapes: dict[int | None, Recording], limit: int | None, shape_known: bool
) -> None:
    recording = landscapes[limit]
    files = [
        file
        for file in trees["0.5.17"].shipped_files()
        if not (file.experts == 128 and file.intermediate == 768 and "H100" in file.device)
    ]
    search = Search(QWEN, recording.rows, seeds(files, QWEN, find_card("H100")), shape_known=shape_known)
    run_search(search, runner := ReplayRunner(recording))
    regret = Regret.of(search, recording)
    assert search.asked <= 300
    assert regret.geomean <= 1.003
    assert regret.worst <= 1.015
    assert runner.trials <= (3600 if shape_known else 4700)


def test_no_rows_best_height_is_ruled_out(landscapes: dict[int | None, Recording]) -> None:
    recording = landscapes[None]
    search = Search(QWEN, recording.rows, ())
    for tokens in recording.rows:
        sensible = {k: r for k, r in recording.kernels.items() if tokens in search.sensible_rows(k.tile)}
        assert Recording(sensible).best(tokens) == recording.best(tokens)


def replay(path: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/replay.py"), str(path), "--json", *options]
    environment = {**os.environ, "MOEFIX_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")


def test_the_script(trees: dict[str, Tree], moefix_home: Path, write: Writer) -> None:
    done = replay(LANDSCAPE, moefix_home, "--limit", "101376", "--limit-column", "shared_bytes_sm89")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"kernels", "space", "trials", "compile_cpu_s", "regret"}
    assert set(result["regret"]) == {"geomean", "max", "rows"}
    assert result["kernels"] <= 300
    assert result["space"] == 3360
    assert result["regret"]["geomean"] <= 1.003
    assert result["regret"]["max"] == max(result["regret"]["rows"].values()) <= 1.015
    only_up = replay(write(LINES[:3]), moefix_home, "--dtype", "none")
    assert json.loads(only_up.stdout)["regret"] == {"geomean": 1.0, "max": 1.0, "rows": {"1": 1.0, "8": 1.0}}


def test_the_script_says_what_is_wrong(trees: dict[str, Tree], moefix_home: Path, write: Writer) -> None:
    lacking = replay(write(LINES), moefix_home, "--limit", "1000", "--limit-column", "nonsense")
    assert lacking.returncode == UsageError.exit_code
    assert "lacks the column nonsense" in lacking.stderr
    nothing = replay(write(LINES), moefix_home, "--limit", "50")
    assert nothing.returncode == UsageError.exit_code
    assert "Raise --limit" in nothing.stderr
