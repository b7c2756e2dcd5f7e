from __future__ import annotations

import csv
import gzip
from dataclasses import replace

import pytest

from fixer.base.errors import StoreError
from fixer.tuning.search.recording import COLUMNS, write_recording
from fixer.tuning.search.replay import TILE_COLUMNS, Recording
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, Projection, Tile

UP = Kernel(Projection.GATE_UP, Tile(16, 64, 128, 1, 4, 3))
TALL = Kernel(Projection.GATE_UP, Tile(64, 128, 64, 16, 8, 2))
DOWN = Kernel(Projection.DOWN, Tile(16, 128, 128, 1, 4, 4))
LOOKS = [
    Look(Build(UP, Outcome.OK, 24576, 96, 0, 0.3754)),
    Look(Build(TALL, Outcome.OK, 73728, 255, 12, 1.5)),
    Look(Build(DOWN, Outcome.OK, 40960, 128, 0, 0.5)),
    Look(Build(replace(DOWN, projection=Projection.GATE_UP), Outcome.CRASHED)),
]
TIMINGS = [
    Timing(DOWN, 1, 8.125, 8.0, 3),
    Timing(UP, 16, 12.3456, 12.0, 17),
    Timing(UP, 1, 10.0, 9.5, 3),
    Timing(TALL, 16, 99.0, 99.0, 1),
]


def read(path):
    with gzip.open(path, "rt", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_time_is_a_line_with_the_columns(tmp_path):
    path = tmp_path / "times.csv.gz"
    assert write_recording(path, LOOKS, TIMINGS) == 4
    lines = read(path)
    assert len(lines) == 4
    assert all(tuple(line) == COLUMNS for line in lines)
    assert {(line["phase"], line["M"], line["BLOCK_SIZE_M"]) for line in lines} == {
        ("down", "1", "16"),
        ("up", "16", "16"),
        ("up", "1", "16"),
        ("up", "16", "64"),
    }
    (line,) = [line for line in lines if line["phase"] == "up" and line["rough"] == "1"]
    assert line == {
        "phase": "up",
        "M": "16",
        "BLOCK_SIZE_M": "64",
        "BLOCK_SIZE_N": "128",
        "BLOCK_SIZE_K": "64",
        "GROUP_SIZE_M": "16",
        "num_warps": "8",
        "num_stages": "2",
        "us": "99.0",
        "us_min": "99.0",
        "rough": "1",
        "shared_bytes": "73728",
        "regs": "255",
        "spills": "12",
        "compile_s": "1.5",
        "USE_TMA": "0",
    }
    assert set(TILE_COLUMNS) < set(COLUMNS)


def test_a_replay_reads_it_back(tmp_path):
    path = tmp_path / "times.csv.gz"
    write_recording(path, LOOKS, TIMINGS)
    recording = Recording.read(path, limit=50_000)
    assert recording.rows == (1, 16)
    assert recording.projections == (Projection.GATE_UP, Projection.DOWN)
    assert set(recording.kernels) == {UP, TALL, DOWN}
    for timing in TIMINGS:
        back = recording.kernels[timing.kernel].timings[timing.tokens]
        assert back.microseconds == pytest.approx(timing.microseconds, abs=0.006)
        assert back.least == pytest.approx(timing.least, abs=0.006)
        assert (back.replays == 1) == (timing.replays == 1)
    assert recording.kernels[UP].compile_seconds == pytest.approx(0.375)
    assert [recording.fits(recording.kernels[kernel]) for kernel in (UP, TALL, DOWN)] == [True, False, True]


def test_the_same_times_make_the_same_file(tmp_path):
    write_recording(tmp_path / "a.csv.gz", LOOKS, TIMINGS)
    write_recording(tmp_path / "b.csv.gz", LOOKS, reversed(TIMINGS))
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


def test_nothing_timed_is_a_header_alone(tmp_path):
    path = tmp_path / "times.csv.gz"
    assert write_recording(path, [], []) == 0
    assert gzip.decompress(path.read_bytes()).decode() == ",".join(COLUMNS) + "\n"


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        write_recording(tmp_path / "file" / "times.csv.gz", LOOKS, TIMINGS)


def test_a_tile_with_descriptors_is_another_than_the_same_without(tmp_path):
    path, plain = tmp_path / "times.csv.gz", DOWN
    described = replace(plain, tile=replace(plain.tile, use_tma=True))
    looks = [Look(Build(kernel, Outcome.OK)) for kernel in (plain, described)]
    write_recording(path, looks, [Timing(plain, 1, 9.0, 9.0, 3), Timing(described, 1, 7.0, 7.0, 3)])
    recording = Recording.read(path)
    assert {kernel: of.timings[1].microseconds for kernel, of in recording.kernels.items()} == {
        plain: 9.0,
        described: 7.0,
    }
