"""kill -9 and SIGTERM at random moments, over everything that writes: two hundred rounds, from a seed.

After each round every file is whole, the old one or the new one; the journal opens; the lock is free; nobody is left.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.artefacts.install import install_files
from fixer.artefacts.shelf import artefact_path, find_artefact, save_artefact
from fixer.base.files import write_atomically
from fixer.base.locks import Lock
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.tuning.journal import Journal, RunKey
from fixer.tuning.search.runner import Look
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import BOTH, Kernel, Tile
from tests.support import fakes
from tests.support.fuzz_samples import ARTEFACT, HERE, LAYER
from tests.support.pairs import moe_files
from tests.support.tuning_machine import TuningMachine, machine, undisturbed  # noqa: F401

WRITING_ROUNDS, RACING_ROUNDS, TUNING_ROUNDS = 120, 50, 40

UP, DOWN = "E=8,N=64,device_name=X.json", "E=8,N=64,device_name=X_down.json"
PAIRS = tuple(
    moe_files(UP, DOWN, {m: Tile(16, n, 64, 1) for m in range(1, 200)}, {m: Tile(16, n, 128, 1) for m in range(1, 200)})
    for n in (32, 64, 128)
)
ARTEFACTS = tuple(
    replace(ARTEFACT, model=name * 4000, rows=tuple(replace(ARTEFACT.rows[0], batch=m) for m in range(1, 300)))
    for name in ("a", "b")
)
KEY = RunKey(HERE, LAYER)
SHIPPED = render_table({1: Tile(32, 32, 32, 1)})


def in_child(work) -> int:
    """Do something over and over in a child; SIGTERM unwinds there as it does in moefix."""
    pid = os.fork()
    if pid:
        return pid
    code, came = 1, []

    def leave(number: int, _: object) -> None:
        came.append(number)
        sys.exit(128 + number)

    try:
        signal.signal(signal.SIGTERM, leave)
        while not came:  # pytest's and hypothesis's gc callbacks swallow what is raised in them
            work()
        sys.exit(128 + came[0])
    except SystemExit as fault:
        code = fault.code
    except BaseException as fault:  # told by the exit code
        Path(os.environ["KILLS_REPORT"]).write_text(repr(fault))
        code = 99
    finally:
        os._exit(code)


def end(pid: int, number: int) -> None:
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    told = Path(os.environ["KILLS_REPORT"])
    assert not told.exists(), told.read_text()
    if number == signal.SIGKILL:
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        assert os.waitstatus_to_exitcode(status) in (143, -signal.SIGTERM)  # the latter in its first instant


@pytest.fixture(autouse=True)
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("KILLS_REPORT", str(tmp_path / "report"))


def looks(chance: random.Random) -> Look:
    kernel = Kernel(chance.choice(BOTH), Tile(16, 32, 64, chance.randrange(1, 400), 4, 3))
    timings = tuple(Timing(kernel, tokens, 10.0 + tokens, 9.0, 3) for tokens in (1, 16, 512))
    return Look(Build(kernel, Outcome.OK, 4096, 40, 0, 0.5), timings)


def test_writers_killed_at_any_moment(tmp_path, capsys):
    chance, home, folder = random.Random(99), tmp_path / "home", tmp_path / "sglang" / "configs" / "triton_3_6_0"
    folder.mkdir(parents=True)
    (folder / UP).write_bytes(SHIPPED)
    path = artefact_path(home, HERE, LAYER)
    damaged = [b"{", b'{"schema": 1', ARTEFACT.to_json().encode()[:-99], b"\x00" * 400]
    laid: list[bytes] = []
    mine = random.Random()

    def work() -> None:
        match mine.randrange(5):
            case 0 | 1:
                save_artefact(home, mine.choice(ARTEFACTS))
            case 2:
                install_files(folder, mine.choice(PAIRS), home, "0.5.17")
            case 3:
                journal = Journal(home / "journal.sqlite", KEY)
                for _ in range(10):
                    journal.write(looks(mine))
                journal.close()
                assert journal.notes == ()
            case 4:
                find_artefact(home, HERE, LAYER)  # sets the damaged one aside

    known: set[int] = set()
    for turn in range(WRITING_ROUNDS):
        mine.seed(turn)
        pid = in_child(work)
        time.sleep(chance.random() ** 2 * 0.15)
        end(pid, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        if path.exists():
            content = path.read_bytes()
            assert content in [*(artefact.to_json().encode() for artefact in ARTEFACTS), *laid[-1:]], turn
        for name, tables in zip((UP, DOWN), zip(*(files.tables for files in PAIRS), strict=True), strict=True):
            if (folder / name).exists():
                assert (folder / name).read_bytes() in [SHIPPED, *map(render_table, tables)], turn
        before = folder / (UP + ".before-moefix")
        assert not before.exists() or before.read_bytes() == SHIPPED
        if (home / "journal.sqlite").exists():
            journal = Journal(home / "journal.sqlite", KEY)
            assert journal.notes == (), turn
            kept = {hash(kernel) for kernel in journal.looks()}
            journal.close()
            assert known <= kept  # what was written stays written
            known = kept
        # Every damaged content that was ever laid there is still somewhere.
        there = {each.read_bytes() for each in path.parent.glob("*")} if path.parent.is_dir() else set()
        assert set(laid) <= there, turn
        if turn % 10 == 9 and path.exists():
            laid.append(damaged[len(laid) % len(damaged)] + b" " * len(laid))
            path.write_bytes(laid[-1])
            find_artefact(home, HERE, LAYER)
            assert not path.exists()
    assert known
    # Undisturbed, it ends as if nothing had been.
    save_artefact(home, ARTEFACTS[0])
    install_files(folder, PAIRS[0], home, "0.5.17")
    assert find_artefact(home, HERE, LAYER).artefact == ARTEFACTS[0]
    assert (folder / UP).read_bytes() == render_table(PAIRS[0].tables[0])
    assert parse_table((folder / DOWN).read_bytes()) == PAIRS[0].tables[1]
    strange = [each for each in folder.iterdir() if each.suffix == ".json" and each.name not in (UP, DOWN)]
    assert strange == []
    with capsys.disabled():
        print(f"\n[{WRITING_ROUNDS} writers killed, {len(known)} trials kept, {len(laid)} damaged files kept] ", end="")


def test_racers_for_a_lock_killed_at_any_moment(tmp_path):
    """Each works on a file as if it were alone; one is killed in every round, and the others go on."""
    chance, lock, board = random.Random(7), tmp_path / "locks" / "card.lock", tmp_path / "board"

    def work() -> None:
        with Lock(lock, poll_seconds=0.001):
            me = f"{os.getpid()} {time.monotonic_ns()}".encode()
            write_atomically(board, me)
            time.sleep(0.001)
            assert board.read_bytes() == me, "another held the lock at the same time"

    racers = [in_child(work) for _ in range(3)]
    try:
        for _ in range(RACING_ROUNDS):
            time.sleep(chance.random() * 0.03)
            end(racers.pop(0), chance.choice((signal.SIGKILL, signal.SIGTERM)))
            before = board.read_bytes() if board.exists() else b""
            # Somebody still gets on.
            assert fakes.eventually(lambda before=before: board.exists() and board.read_bytes() != before, 20)
            racers.append(in_child(work))
    finally:
        for pid in racers:
            end(pid, signal.SIGKILL)
    with Lock(lock, patience_seconds=5):
        pass


def test_tunings_killed_at_any_moment(machine, undisturbed, capsys):
    chance, ends = random.Random(2026), []
    machine.env |= {fakes.PAUSE: "0.004"}
    for turn in range(TUNING_ROUNDS):
        process = machine.start()
        if turn % 2:
            # Somewhere in the measuring; else anywhere from the first instruction on.
            wanted = machine.timed() + chance.randrange(40)
            fakes.eventually(lambda wanted=wanted, p=process: machine.timed() >= wanted or p.poll() is not None, 60)
        else:
            time.sleep(chance.random() * 0.8)
        number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            ends.append(time.monotonic() - began)
            assert "Traceback" not in err, err
        # Before Python itself is up SIGTERM is fatal; 41 where the server had started.
        assert process.returncode in (-signal.SIGKILL, 143, -signal.SIGTERM, 41)
        assert fakes.eventually(lambda: not machine.processes(), 10), turn
        assert machine.kept() in (None, undisturbed)
        for name in machine.package.rglob("E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3*.json"):
            parse_table(name.read_bytes())
        journal = machine.home / "journal.sqlite"
        if journal.exists():
            database = sqlite3.connect(journal)
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            database.close()
        if process.returncode == 41:  # it was quicker
            shutil.rmtree(machine.home / "artefacts")
            journal.unlink()
    machine.env |= {fakes.PAUSE: "0"}
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    assert not list(machine.home.rglob("*.damaged-*"))
    total = WRITING_ROUNDS + RACING_ROUNDS + TUNING_ROUNDS
    assert total >= 200
    with capsys.disabled():
        print(f"\n[{total} rounds of kill -9 and SIGTERM; slowest SIGTERM {max(ends):.2f} s] ", end="")
    # moefix ends itself after 1.7 s at the latest (`fixer.cli`); a busy machine adds seconds to one end, not to most.
    assert statistics.median(ends) < 2
    assert max(ends) < 10
