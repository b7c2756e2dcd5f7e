"""`moefix bench --serve` through entrypoint.py, with a stand-in for SGLang's server, and its parts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fixer.base.errors import SGLangError, UsageError
from fixer.bench.config_dirs import before_moefix
from fixer.bench.passes import Load
from fixer.bench.results import Kind, Side, Verdict
from fixer.bench.schedule import FULL_LOADS, QUICK_LOADS, Start, parse_loads, schedule
from fixer.bench.server import Server, last_lines, local_environment
from fixer.bench.shelf import read_result
from fixer.machine.processes import end_group, start_child
from fixer.sglang.server import files_used, local_flags
from fixer.sglang.tuning_files import render_table
from fixer.workload import Tile
from tests.support import fakes
from tests.support.serve_machine import ServeMachine
from tests.support.serving import FOLDER, LARGE, SMALL

MIDDLE = Tile(32, 64, 128, 1, 4, 4)


def end(processes) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machine(tmp_path, trees, driver, models, compiled):
    made = ServeMachine(tmp_path, trees["0.5.17"].package, driver, models, compiled)
    yield made
    left = made.processes
    end(left)
    assert not left


# --- both sides ------------------------------------------------------------------------------------------------------


def test_equal_sides_are_neutral(machine):
    machine.tuned()
    machine.steps(none=0.02, m16=0.02)
    for _ in range(4):  # by design one equal comparison in twenty is taken for a difference
        _, row = machine.bench("--loads", "2:8:8:6")
        if row["verdict"] == "neutral":
            break
    assert row["verdict"] == "neutral"
    assert [load["verdict"] for load in row["serve"]] == ["neutral"]


def test_both_sides_in_turn(machine):
    artefact = machine.tuned()
    result, row = machine.bench("--rounds", "2")
    assert result.code == 0, result.err
    assert [record["key"] for record in machine.records] == ["none", "16", "16", "none"]
    own, tuned = machine.records[0], machine.records[1]
    assert Path(own["env"]["SGLANG_MOE_CONFIG_DIR"]).name == "sglang"
    pair = [f"configs/triton_3_6_0/{name}" for name in (artefact.gate_up_file, artefact.down_file)]
    shipped = machine.package / FOLDER
    names = {f"configs/{path.parent.name}/{path.name}" for path in shipped.parent.glob("triton_*/*.json")}
    assert names
    assert set(own["listing"]) == names
    assert set(tuned["listing"]) == names | set(pair)
    assert tuned["tables"][0]["1"] == SMALL.to_json()
    assert tuned["argv"][:-4] == [*machine.flags[2:], f"--model-path={machine.model}"]
    assert tuned["argv"][-4:-1] == ["--host", "127.0.0.1", "--port"]
    parsed = read_result(json.dumps(row))
    assert parsed.complete
    assert parsed.kind is Kind.SERVE
    assert parsed.verdict in Verdict
    assert [load.load for load in parsed.serve] == [Load(1, 8, 4, 3), Load(4, 8, 6, 8), Load(1, 32, 1, 6)]
    for load in parsed.serve:
        for arm, starts in ((load.sglang, (0, 0, 3, 3)), (load.tuned, (1, 1, 2, 2))):
            assert arm.starts == starts
            assert arm.failed == 0
            assert arm.ttft_ms.median >= 3
            assert len(arm.ttft_ms.passes) == 4
            assert (arm.itl_ms is None) == load.load.is_prefill
        assert load.sglang.files == ()
        assert load.tuned.files == tuple(name.removeprefix("configs/") for name in pair)
    kept = list((machine.home / "bench").glob("*.json"))
    assert [json.loads(path.read_text()) for path in kept] == [row]
    assert kept[0].name.startswith(row["artefact"].removesuffix(".json") + "-serve-")


def test_a_slower_side_is_seen(machine, tmp_path):
    machine.tuned()
    machine.steps(none=0.03, m16=0.01)
    result, row = machine.bench("--passes", "1", "--out", str(tmp_path / "out.json"))
    assert result.code == 0, result.err
    assert [record["key"] for record in machine.records] == ["none", "16", "16", "none"] * 2
    assert row["verdict"] == "faster"
    assert row["ratio"] > 1.3
    assert 1.3 < row["interval"][0] < row["ratio"] < row["interval"][1]
    assert {load["verdict"] for load in row["serve"]} == {"faster"}
    assert json.loads((tmp_path / "out.json").read_text()) == row
    machine.steps(none=0.01, m16=0.03)
    text = machine.run("bench", "--serve", "--loads", "4:8:6:8", "--passes", "1", *machine.flags)
    assert "slower with the tuned configuration" in text.out
    assert "4 streams, 8 in, 6 out" in text.out


def test_one_start_of_each_side_decides_nothing(machine):
    """However far apart they are: the first server of a cold machine was 10 % slower than the second."""
    machine.tuned()
    machine.steps(none=0.03, m16=0.01)
    result, row = machine.bench("--rounds", "1", "--loads", "4:8:6:8")
    assert result.code == 0, result.err
    assert row["ratio"] > 1.3
    assert row["interval"] is None
    assert row["verdict"] == row["serve"][0]["verdict"] == "not decided"
    text = machine.run("bench", "--serve", "--loads", "4:8:6:8", "--rounds", "1", *machine.flags)
    assert "verdict  the server: not decided (one start each)" in text.out


def test_what_moefix_installed_is_not_sglangs_own(machine):
    """A pair in the tree and in an older Triton's folder, with the file that was there before one of them."""
    artefact = machine.tuned()
    shipped = machine.package / FOLDER
    old = render_table({8: MIDDLE})
    other = shipped.parent / "triton_3_5_1"
    for folder, name, before in (
        (shipped, artefact.gate_up_file, b""),
        (shipped, artefact.down_file, b""),
        (other, artefact.gate_up_file, old),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(render_table({1: LARGE}))
        (folder / (name + ".before-moefix")).write_bytes(before)
    machine.steps(m32=0.01, m16=0.01)
    result, row = machine.bench("--rounds", "1", "--loads", "1:8:4:3")
    assert result.code == 0, result.err
    assert machine.records[0]["tables"] == [json.loads(old), None]
    assert row["serve"][0]["sglang"]["files"] == [f"triton_3_5_1/{artefact.gate_up_file}"]


def test_a_pretended_limit_has_the_default_of_such_a_card(machine):
    """bf16: 16x32x64 up to M = E, 64x64x32 above; the tuned side is the artefact of that limit."""
    free = machine.tuned()
    machine.artefact(shared_memory=101376)
    result, rows = machine.bench("--rounds", "1", "--smem-limit", "own", "--smem-limit", "101376", "--loads", "1:8:4:3")
    assert result.code == 0, result.err
    assert [record["key"] for record in machine.records] == ["none", "16", "16", "16"]
    assert [row["smem_limit"] for row in rows] == [None, 101376]
    assert rows[1]["environment"]["shared_memory"] == 232448
    assert rows[0]["artefact"] != rows[1]["artefact"]
    # Free: own, tuned. Limited: the other way round.
    limited = machine.records[3]
    tables = [{"8": Tile(16, 32, 64, 1).to_json(), "9": Tile(64, 64, 32, 8).to_json()}] * 2
    assert limited["tables"] == tables
    assert rows[1]["serve"][0]["sglang"]["files"][0] == f"triton_3_6_0/{free.gate_up_file}"


def test_no_tuning_is_an_error_that_says_so(machine):
    machine.tuned(driver="1.2")
    result, _ = machine.bench("--skip-tune")
    assert result.code == 9
    assert "moefix tune" in result.err
    assert machine.records == []
    long = machine.run("bench", "--serve", *machine.flags, "--moefix-skip-tune")
    assert long.code == 9
    assert "driver was 1, is 580" in long.err


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_at_its_start(machine):
    machine.tuned()
    machine.fault(m16="die")
    result, _ = machine.bench("--rounds", "2")
    assert result.code == 5
    assert "tuned side: The server ended with code 3 before it was healthy" in result.err
    assert "| RuntimeError: out of resource" in result.err
    assert "\x1b" not in result.err
    assert "Traceback (most" not in result.err
    # The side that ran before is kept.
    (kept,) = [json.loads(path.read_text()) for path in (machine.home / "bench").glob("*.json")]
    assert kept["complete"] is False
    assert len(kept["serve"][0]["sglang"]["output_tokens_per_s"]) == 2


def test_what_tuning_cures(machine):
    machine.tuned()
    machine.fault(none="oor")
    result, row = machine.bench("--rounds", "2")
    assert result.code == 0, result.err
    assert [record["key"] for record in machine.records] == ["none", "16", "16"]
    assert row["verdict"] == "cured"
    assert row["complete"] is True
    assert any("out of shared memory" in note for note in row["notes"])


def test_a_server_that_is_never_healthy(machine):
    machine.tuned()
    machine.fault(none="mute")
    result, _ = machine.bench("--wait", "1.5")
    assert result.code == 5
    assert "not healthy after" in result.err


def test_a_server_that_answers_with_errors(machine):
    machine.tuned()
    machine.fault(m16="errors")
    result, _ = machine.bench("--rounds", "1")
    assert result.code == 5
    assert "500" in result.err
    assert "no luck" in result.err


def test_files_that_are_not_read_are_an_error(machine):
    machine.tuned()
    machine.env["FAKE_FILES"] = "other.json|other_down.json"
    result, _ = machine.bench("--rounds", "1")
    assert result.code == 5
    assert "does not say that it read" in result.err


@pytest.mark.parametrize("fault", ["", "stubborn"])
def test_sigterm_during_a_load_ends_all_of_it(machine, fault):
    machine.tuned()
    machine.steps(none=0.05, m16=0.05)
    machine.fault(none=fault)
    process = machine.start("bench", "--serve", "--loads", "4:8:2000:8", *machine.flags)
    try:
        assert fakes.eventually(lambda: len(machine.processes) >= 3, 60)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert fakes.eventually(lambda: not machine.processes, 2)


def test_what_was_measured_is_there_while_it_grows(machine, tmp_path):
    """A run that is ended from outside leaves what it has: nothing has to be asked for."""
    machine.tuned()
    out = tmp_path / "out.json"
    process = machine.start("bench", "--serve", "--loads", "1:8:4:3", "--out", str(out), *machine.flags)
    try:
        assert fakes.eventually(lambda: out.exists() and "tuned" in out.read_text() and len(machine.records) > 2, 60)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
    finally:
        process.kill()
    left = read_result(out.read_bytes())
    assert not left.complete
    assert left.serve[0].sglang.starts[:2] == (0, 0)
    assert left.serve[0].tuned.starts[:2] == (1, 1)


def test_a_killed_bench_takes_its_server_along(machine):
    machine.tuned()
    process = machine.start("bench", "--serve", "--loads", "1:8:4000:2", *machine.flags)
    assert fakes.eventually(lambda: len(machine.records) == 1, 60)
    server = machine.records[0]["pid"]
    time.sleep(1)
    process.kill()
    process.wait()
    assert fakes.eventually(lambda: server not in machine.processes, 10)
    end(machine.processes)  # the stand-in's own child, which SGLang's would not leave
    assert fakes.eventually(lambda: not machine.processes, 5)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_loads_on_the_command_line():
    assert parse_loads("1, 64,prefill", QUICK_LOADS) == (QUICK_LOADS[0], QUICK_LOADS[3], QUICK_LOADS[4])
    assert parse_loads("2:10:20:30,16", FULL_LOADS) == (Load(2, 10, 20, 30), FULL_LOADS[2])
    for text in ("", "3", "1,1", "1:2:3", "0:1:1:1", "4:8:8:2", "1:1:1:-1", "1:1:1:999999999", "9999:1:1:9999"):
        with pytest.raises(UsageError):
            parse_loads(text, QUICK_LOADS)


def test_starts_in_turn():
    own, tuned = Side.SGLANG, Side.TUNED
    assert schedule(1, 2) == (Start(0, own, 0), Start(0, tuned, 1), Start(0, tuned, 2), Start(0, own, 3))
    assert [(start.subject, start.side) for start in schedule(2, 2)] == [
        *((0, own), (0, tuned), (1, tuned), (1, own)),
        *((0, tuned), (0, own), (1, own), (1, tuned)),
    ]


def test_flags_for_a_server_of_our_own():
    flags = [
        "--model-path",
        "x",
        "--api-key",
        "secret",
        "--tp=2",
        "--admin-api-key=s",
        "--port",
        "1",
        "--ssl-keyfile",
        "k",
    ]
    local = local_flags(flags, 31000)
    assert local == ["--model-path", "x", "--tp", "2", "--port", "1", "--host", "127.0.0.1", "--port", "31000"]


def test_the_logs_words():
    log = (
        "[2026 TP0] Using MoE kernel config from /a b/configs/triton_3_6_0/E=8,N=64.json.\n"
        "Loading 10%|x| \rUsing MoE kernel config from /a b/configs/triton_3_6_0/E=8,N=64.json.\n"
        "Config file not found at /y.json. Fallback to triton version 3.2.0 and use MoE kernel config from /x/z.json.\n"
        "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at /q.json, you can\n"
    )
    assert [str(path) for path in files_used(log)] == ["/a b/configs/triton_3_6_0/E=8,N=64.json", "/x/z.json"]


def test_the_end_of_a_log():
    assert last_lines("a\n\n\x1b[31mred\x1b[0m\nb\n", 2) == ["[31mred[0m", "b"]


def test_no_proxy_between_our_own(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert local_environment()["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_the_tree_before_moefix(tmp_path):
    folder = tmp_path / "triton_3_6_0"
    folder.mkdir()
    for name, content in (("a", b"a"), ("b", b"new"), ("c", b"new")):
        (folder / f"{name}.json").write_bytes(content)
    (folder / "b.json.before-moefix").write_bytes(b"old")
    (folder / "c.json.before-moefix").write_bytes(b"")
    (tmp_path / "notes.json").touch()
    found = {str(relative): source.read_bytes() for source, relative in before_moefix(tmp_path)}
    assert found == {"triton_3_6_0/a.json": b"a", "triton_3_6_0/b.json": b"old"}


def test_the_whole_group_ends(tmp_path):
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('x', flush=True); time.sleep(600)"
    with (tmp_path / "log").open("wb") as log:
        child = start_child([sys.executable, "-c", script], local_environment(), log)
    assert fakes.eventually(lambda: (tmp_path / "log").stat().st_size > 0, 20)
    family = {child.pid} | fakes.descendants(child.pid)
    assert len(family) == 2
    end_group(child)
    assert not family & fakes.descendants_of_me()
    assert child.returncode == -signal.SIGTERM


def test_a_command_that_is_not_there(tmp_path):
    server = Server([], tmp_path, tmp_path / "logs" / "log", 5)
    server._command = ["/no/such/python"]
    with pytest.raises(SGLangError, match="cannot be started"):
        server.__enter__()


def test_the_presets_are_those_of_the_issue():
    for preset in (FULL_LOADS, QUICK_LOADS):
        assert [load.streams for load in preset if not load.is_prefill] == [1, 4, 16, 64]
        assert [load.is_prefill for load in preset] == [False] * 4 + [True]
