"""A whole tuning without a card: real compilation, real journal, synthetic times."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixer.artefacts.artefact import Artefact, Decision
from fixer.artefacts.gains import covers, geometric_gain
from fixer.artefacts.shelf import find_artefact, save_artefact
from fixer.base.errors import TuneError
from fixer.machine.cards import Card
from fixer.machine.worker import ChildProcess
from fixer.tuning.comparison import Question
from fixer.tuning.journal import Journal, RunKey
from fixer.tuning.measure import card_runner
from fixer.tuning.search.trials import Outcome
from fixer.tuning.turn import turn
from fixer.workload import BOTH, Kernel, Tile
from tests.support import fake_layer, fakes

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import sys; from tests.support import fakes; fakes.tune_in_child(*sys.argv[1:])"


@pytest.fixture(scope="module")
def package(trees):
    return trees["0.5.17"].package


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What was compiled, for all tests of this file: the data folders have links to it, which `tune` does not empty."""
    folder = tmp_path_factory.mktemp("compiled")
    for name in ("search", "server"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def new_home(tmp_path, compiled):
    def make(name="home"):
        home = tmp_path / name
        (home / "cache").mkdir(parents=True)
        (home / "cache" / "triton-search").symlink_to(compiled / "search")
        return home

    return make


@pytest.fixture
def home(new_home):
    return new_home()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, compiled, log):
    stub = fakes.stub_torch(tmp_path / "stub")
    monkeypatch.syspath_prepend(stub)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (stub, ROOT / "tests", ROOT))))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled / "server"))
    monkeypatch.setenv(fakes.LOG, str(log))
    monkeypatch.delenv(fakes.FAULTS, raising=False)
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    return log


def timed(log):
    return len(fakes.logged(log, "time"))


def journal_of(job):
    return Journal(job.home / "journal.sqlite", RunKey(job.environment, job.workload))


def test_from_nothing_to_an_artefact(package, home, log):
    job = fakes.small_job(package, home)
    tuned = fakes.tune_small(job)
    artefact = tuned.artefact
    assert [row.batch for row in artefact.rows] == list(fakes.TUNE_ROWS)
    assert covers(artefact, fakes.TUNE_ROWS)
    assert not covers(artefact, (*fakes.TUNE_ROWS, 256))
    for row in artefact.rows:
        assert row.gate_up.block_m == row.down.block_m
        assert not row.gate_up.use_tma
        assert None not in row.times
        assert row.decision in (Decision.TUNED, Decision.KEPT_SGLANG)
    assert any(row.decision is Decision.TUNED for row in artefact.rows)
    assert geometric_gain(artefact) > 1.05
    assert artefact.gate_up_file == "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3.json"
    assert artefact.down_file == "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3_down.json"
    assert artefact.measured
    assert (artefact.environment, artefact.workload) == (job.environment, job.workload)
    assert tuned.resumed == 0
    assert {"start", "search", "closer looks", "compiling for the server", "finals"} <= set(tuned.timeline)
    assert len(tuned.looks) <= 24
    # It is kept, found again, and every measurement is in the journal.
    save_artefact(home, artefact)
    assert find_artefact(home, job.environment, job.workload).artefact == Artefact.from_json(artefact.to_json())
    journal = journal_of(job)
    assert journal.looks().keys() == {look.build.kernel for look in tuned.looks}
    assert len(journal.timings()) == timed(log)
    journal.close()
    assert fakes.unique((timing.kernel, timing.tokens) for timing in tuned.timings)
    assert fakes.repeated(log) == []
    # What the server will launch is compiled.
    assert fakes.cubins(Path(os.environ["TRITON_CACHE_DIR"]))


def test_no_pair_that_was_measured_is_better_than_the_choice(package, home):
    tuned = fakes.tune_small(fakes.small_job(package, home))
    kernels = [look.build.kernel for look in tuned.looks if look.build.outcome is Outcome.OK]
    measured = {(timing.kernel, timing.tokens) for timing in tuned.timings}
    for row in tuned.artefact.rows:
        if row.decision is not Decision.TUNED:
            continue
        best = defaultdict(lambda: defaultdict(lambda: float("inf")))
        for kernel in kernels:
            if (kernel, row.batch) in measured:
                of_height = best[kernel.tile.block_m]
                time_of = fakes.microseconds(kernel, row.batch)
                of_height[kernel.projection] = min(of_height[kernel.projection], time_of)
        sums = [sum(times.values()) for times in best.values() if len(times) == 2]
        assert row.us[0] + row.us[1] == pytest.approx(min(sums))


def test_a_second_run_measures_nothing_and_fresh_measures_again(package, home, log):
    first = fakes.tune_small(fakes.small_job(package, home))
    once = timed(log)
    assert once > 20
    second = fakes.tune_small(fakes.small_job(package, home))
    assert timed(log) == once
    assert second.resumed == len(first.looks)
    assert fakes.choices(second.artefact) == fakes.choices(first.artefact)
    fresh = fakes.tune_small(fakes.small_job(package, home, fresh=True))
    assert fresh.resumed == 0
    assert timed(log) >= 1.5 * once
    assert fakes.choices(fresh.artefact) == fakes.choices(first.artefact)


def test_more_rows_ask_for_the_missing_ones_only(package, home, log, monkeypatch):
    fakes.tune_small(fakes.small_job(package, home))
    before = len(fakes.logged(log, "time"))
    monkeypatch.setattr(fakes, "TUNE_ROWS", (1, 16, 32, 128))
    tuned = fakes.tune_small(fakes.small_job(package, home), kernels=30)
    assert [row.batch for row in tuned.artefact.rows] == [1, 16, 32, 128]
    assert any(line[2] == "32" for line in fakes.logged(log, "time")[before:])
    assert fakes.repeated(log) == []


def test_faults_are_survived_recorded_and_not_chosen(package, home, log, monkeypatch):
    clean = fakes.tune_small(fakes.small_job(package, home))
    # The winners themselves now misbehave.
    (row,) = [row for row in clean.artefact.rows if row.batch == 16]
    ups = sorted(
        (look.build.kernel for look in clean.looks if look.build.outcome is Outcome.OK),
        key=lambda kernel: fakes.microseconds(kernel, 16),
    )
    crash, hang, wrong = ups[:3]
    faults = {crash: "crash", hang: "hang", wrong: "wrong"}
    monkeypatch.setenv(fakes.FAULTS, json.dumps({fakes.name_of(kernel): how for kernel, how in faults.items()}))
    monkeypatch.setattr(card_runner, "LOOK_SECONDS", 1.0)
    tuned = fakes.tune_small(fakes.small_job(package, home, fresh=True))
    outcomes = {look.build.kernel: look.build.outcome for look in tuned.looks}
    assert outcomes[crash] is Outcome.CRASHED
    assert outcomes[hang] is Outcome.TIMED_OUT
    assert outcomes[wrong] is Outcome.WRONG_RESULT
    assert any("started anew" in note for note in tuned.notes)
    journal = journal_of(fakes.small_job(package, home))
    assert {kernel: look.build.outcome for kernel, look in journal.looks().items()} == outcomes
    journal.close()
    for row in tuned.artefact.rows:
        for kernel in (crash, hang, wrong):
            assert (row.gate_up if kernel.projection.value == "gate_up" else row.down) != kernel.tile
    # And they are not tried again.
    starts = len(fakes.logged(log, "start"))
    again = fakes.tune_small(fakes.small_job(package, home))
    assert fakes.choices(again.artefact) == fakes.choices(tuned.artefact)
    assert len(fakes.logged(log, "start")) == starts + 1


def test_sglangs_own_that_crashes_is_replaced(package, home, monkeypatch):
    """Row 1's own (16x32x64) dies on this card: what is installed must run, and is not called measured against it."""
    own = [f"{projection}/16/32/64/1/4/3" for projection in ("gate_up", "down")]
    monkeypatch.setenv(fakes.FAULTS, json.dumps(dict.fromkeys(own, "crash")))
    row = fakes.tune_small(fakes.small_job(package, home)).artefact.rows[0]
    assert row.batch == 1
    assert (row.gate_up.block_n, row.gate_up.block_k) != (32, 64)
    assert row.decision is Decision.FITTING_ONLY
    assert row.times[2:] == (None, None)


def test_a_winner_that_dies_in_the_finals_costs_one_row_at_most(package, home, monkeypatch):
    row = fakes.tune_small(fakes.small_job(package, home)).artefact.rows[1]
    assert row.decision is Decision.TUNED
    name = "gate_up/" + "/".join(str(part) for part in row.gate_up.to_json().values())
    monkeypatch.setenv(fakes.FAULTS, json.dumps({name: "crash in a duel"}))
    again = fakes.tune_small(fakes.small_job(package, home)).artefact
    assert covers(again, fakes.TUNE_ROWS)
    assert again.rows[1].gate_up != row.gate_up


def test_two_cards_share_the_rows(package, home, log):
    tuned = fakes.tune_small(fakes.small_job(package, home, cards=2))
    assert covers(tuned.artefact, fakes.TUNE_ROWS)
    by_row = defaultdict(set)
    for device, _, tokens, _ in fakes.logged(log, "time"):
        by_row[tokens].add(device)
    assert {tokens: len(devices) for tokens, devices in by_row.items()} == {"1": 1, "16": 1, "128": 1}
    assert set.union(*by_row.values()) == {"0", "1"}


def test_a_card_on_which_nothing_can_be_timed_is_a_clear_error(package, home):
    job = fakes.small_job(package, home)
    tiny = Card("NVIDIA H100 80GB HBM3", (9, 0), 1024, 81559, index=0, driver="580.159.03")
    with pytest.raises(TuneError, match="M=1"):
        fakes.tune_small(type(job)(job.tree, job.workload, (tiny,), job.rows, "small", "", home))


def test_a_release_with_one_joint_file_gets_one_tile_for_both(trees, package, home):
    job = replace(fakes.small_job(package, home), tree=trees["0.4.9"])
    tuned = fakes.tune_small(job)
    artefact = tuned.artefact
    assert artefact.gate_up_file == "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3.json"
    assert artefact.down_file == ""
    assert all(row.gate_up == row.down for row in artefact.rows)
    assert any(row.decision is Decision.TUNED for row in artefact.rows)
    kernels = {look.build.kernel for look in tuned.looks if look.build.outcome is Outcome.OK}
    timed_rows = {(timing.kernel, timing.tokens) for timing in tuned.timings}
    for row in artefact.rows:
        if row.decision is Decision.TUNED:
            sums = [
                sum(fakes.microseconds(Kernel(projection, kernel.tile), row.batch) for projection in BOTH)
                for kernel in kernels
                if all((Kernel(projection, kernel.tile), row.batch) in timed_rows for projection in BOTH)
            ]
            assert row.us[0] + row.us[1] == pytest.approx(min(sums))
    assert Artefact.from_json(artefact.to_json()) == artefact


# --- the finals through SGLang's layer


@pytest.fixture
def layered(package, home, monkeypatch, tmp_path):
    """A job whose finals run through the stand-in for SGLang's layer, with faults by M."""

    def make(faults):
        monkeypatch.setenv(fake_layer.LOG, str(tmp_path / "layer.log"))
        monkeypatch.setenv(fake_layer.FAULTS, json.dumps(faults))
        monkeypatch.setattr(Question, "start", lambda question: ChildProcess(partial(fake_layer.layer, 32)))
        return replace(fakes.small_job(package, home), layer_package=package)

    return make


def test_the_layer_decides_every_row(layered):
    tuned = fakes.tune_small(layered({}))
    assert tuned.notes == tuned.artefact.notes == ()
    for row in tuned.artefact.rows:
        assert None not in row.layer_times
    assert [row.decision for row in tuned.artefact.rows if row.batch == 128] == [Decision.TUNED]


def test_one_failing_row_is_said_loudly_kept_as_it_is_and_decides_nothing_else(layered):
    tuned = fakes.tune_small(layered({"16": "crash"}))
    rows = {row.batch: row for row in tuned.artefact.rows}
    assert (rows[16].decision, rows[16].layer_times) == (Decision.FITTING_ONLY, (None, None))
    assert rows[16].gate_up == Tile(64, 64, 32, 8)  # SGLang's own for M > E
    assert None not in rows[1].layer_times
    assert (rows[128].decision, None in rows[128].layer_times) == (Decision.TUNED, False)
    assert not any("bare kernels" in note for note in tuned.notes)
    (said,) = [note for note in tuned.artefact.notes if "every configuration tried" in note]
    assert "crashed" in said
    assert "to see it again: python" in said
    assert said in tuned.notes


def test_without_its_layer_the_kernels_decide_and_that_is_said(layered, monkeypatch):
    job = layered({})
    monkeypatch.setattr(Question, "start", lambda question: ChildProcess(fake_layer.missing))
    tuned = fakes.tune_small(job)
    assert any("bare kernels" in note and "no module" in note for note in tuned.notes)
    assert all(None not in row.times for row in tuned.artefact.rows)


def test_no_process_is_left(package, home):
    fakes.tune_small(fakes.small_job(package, home))
    assert fakes.eventually(lambda: fakes.descendants_of_me() <= fakes.helpers())


# --- kill -9 and races -----------------------------------------------------------------------------------------------


def start(package, home, pause=0.004):
    environ = os.environ | {fakes.PAUSE: str(pause)}
    command = [sys.executable, "-c", CHILD, str(package), str(home)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out), err


def segments(log):
    """The measurements of each measuring process, in order."""
    parts = []
    for line in log.read_text().splitlines():
        _, kind, *rest = line.split()
        if kind == "start":
            parts.append([])
        elif kind == "time":
            parts[-1].append(tuple(rest))
    return parts


def test_killed_ten_times_and_resumed(package, new_home, log):
    whole = fakes.tune_small(fakes.small_job(package, new_home("whole")))
    total = timed(log)
    log.unlink()
    chance, home, kills = random.Random(2026), new_home("killed"), 0
    for _ in range(10):
        process = start(package, home)
        wanted = (timed(log) if log.exists() else 0) + chance.randrange(total // 11) + 1
        fakes.eventually(lambda wanted=wanted, process=process: timed(log) >= wanted or process.poll() is not None, 60)
        time.sleep(chance.random() * 0.01)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        # Nothing outlives it: neither the measuring process nor the compiling ones.
        assert fakes.eventually(lambda: fakes.processes_with(fakes.LOG, str(log)) <= fakes.helpers())
    assert kills == 10
    answer, _ = finish(start(package, home))
    assert answer["resumed"] > 0
    assert answer["rows"] == fakes.choices(whole.artefact)
    known = {}
    for number, part in enumerate(segments(log)):
        for line in part:
            if line in known:  # measured again: it must have been in flight when its run was killed
                before, in_flight = known[line]
                assert before < number
                assert (line[0], line[2]) in in_flight
        order = list(dict.fromkeys((line[0], line[2]) for line in part))
        for line in part:
            known[line] = (number, order[-card_runner.SENT_AHEAD :])
    assert len(known) <= total * 1.3


def test_who_waits_for_a_turn_says_so_once(package, home):
    job, notes, has_turn = fakes.small_job(package, home), [], threading.Event()

    def work():
        with turn(home, job.card, SimpleNamespace(note=notes.append)):
            has_turn.set()

    with turn(home, job.card, SimpleNamespace(note=notes.append)):
        waiting = threading.Thread(target=work, daemon=True)
        waiting.start()
        assert fakes.eventually(lambda: notes, 30)
        time.sleep(1.0)
        assert not has_turn.is_set()
    waiting.join(30)
    assert has_turn.is_set()
    (said,) = [note for note in notes if "another moefix is tuning" in note]
    assert f"on this volume (process {os.getpid()}" in said


def test_two_at_once_take_turns(package, home, log):
    first, second = start(package, home), start(package, home)
    (one, one_said), (two, two_said) = finish(first), finish(second)
    assert one["rows"] == two["rows"]
    assert fakes.repeated(log) == []
    assert sorted((one["resumed"], two["resumed"])) == [0, one["looks"]]
    assert ("another moefix is tuning" in one_said) != ("another moefix is tuning" in two_said)
    waiting = one_said if one["resumed"] else two_said
    assert "another moefix is tuning on this volume (process" in waiting
