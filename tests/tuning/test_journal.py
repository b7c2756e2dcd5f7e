from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.artefacts.artefact import Environment
from fixer.base.errors import StoreError
from fixer.tuning.journal import Journal, JournaledRunner, RunKey
from fixer.tuning.search.runner import Look, Request
from fixer.tuning.search.trials import Build, Outcome, Timing
from fixer.workload import Kernel, NumberFormat, Projection, Tile, Workload

ROOT = Path(__file__).resolve().parents[2]
HERE = Environment("NVIDIA H100 80GB HBM3", (9, 0), 232448, "580.159.03", "3.6.0", "0.5.17", "ab" * 32, "0.1.0")
LAYER = Workload(8, 64, 128, 2)
KEY = RunKey(HERE, LAYER)
UP = Kernel(Projection.GATE_UP, Tile(16, 64, 128, 1, 4, 3))
DOWN = Kernel(Projection.DOWN, Tile(32, 128, 64, 16, 8, 2))


def timings(kernel: Kernel, *rows: int, replays: int = 3) -> tuple[Timing, ...]:
    return tuple(Timing(kernel, tokens, 10.0 + tokens / 3, 9.5, replays) for tokens in rows)


GOOD = Look(Build(UP, Outcome.OK, 24576, 96, 4, 0.375, ""), timings(UP, 1, 16))
BAD = Look(Build(DOWN, Outcome.CRASHED, 8192, message="an illegal 'address' \N{SNOWMAN}"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "journal.sqlite"


@pytest.fixture
def open_journal(path):
    opened = []

    def open_one(key: RunKey = KEY) -> Journal:
        opened.append(Journal(path, key))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


@pytest.fixture
def filled(open_journal):
    journal = open_journal()
    journal.write(GOOD)
    journal.write(BAD)
    return journal


def test_what_is_written_is_read_back(filled, open_journal):
    wanted = {UP: GOOD, DOWN: BAD}
    assert filled.looks() == wanted
    filled.close()
    again = open_journal()
    assert again.looks() == wanted
    assert again.timings() == list(GOOD.timings)
    assert again.notes == ()


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_is_read_back(open_journal, outcome):
    look = Look(Build(UP, outcome, 1, 2, 3, 4.5, "why"))
    journal = open_journal()
    journal.write(look)
    assert journal.looks() == {UP: look}


def test_closer_looks_are_kept_beside_the_first(filled):
    (closer,) = timings(UP, 16, replays=7)
    filled.write_timing(closer)
    assert filled.timings() == [*GOOD.timings, closer]
    assert filled.looks()[UP] == GOOD


def test_a_look_written_again_takes_its_place(filled):
    newer = Look(replace(GOOD.build, registers=128), (replace(GOOD.timings[0], microseconds=1.0),))
    filled.write(newer)
    looks = filled.looks()
    assert looks[UP].build == newer.build
    assert set(looks[UP].timings) == {newer.timings[0], GOOD.timings[1]}


OTHERS = {
    "card": RunKey(replace(HERE, card="NVIDIA H200"), LAYER),
    "capability": RunKey(replace(HERE, capability=(8, 9)), LAYER),
    "shared memory": RunKey(replace(HERE, shared_memory=101376), LAYER),
    "driver": RunKey(replace(HERE, driver="581.1"), LAYER),
    "Triton": RunKey(replace(HERE, triton="3.6.1"), LAYER),
    "SGLang": RunKey(replace(HERE, sglang="0.5.18"), LAYER),
    "kernel": RunKey(replace(HERE, kernel_hash="cd" * 32), LAYER),
    "experts": RunKey(HERE, replace(LAYER, experts=16)),
    "width": RunKey(HERE, replace(LAYER, intermediate=128)),
    "hidden size": RunKey(HERE, replace(LAYER, hidden_size=256)),
    "top-k": RunKey(HERE, replace(LAYER, top_k=4)),
    "format": RunKey(HERE, replace(LAYER, number_format=NumberFormat.FP8_W8A8)),
    "blocks": RunKey(HERE, replace(LAYER, block_shape=(128, 128))),
    "channels": RunKey(HERE, replace(LAYER, per_channel_quant=True)),
    "group": RunKey(HERE, replace(LAYER, group_size=128)),
    "dtype": RunKey(HERE, replace(LAYER, activation_dtype="float16")),
    "ep": RunKey(HERE, replace(LAYER, ep_size=2)),
}


@pytest.mark.parametrize("key", OTHERS.values(), ids=OTHERS.keys())
def test_another_key_sees_nothing(filled, open_journal, key):
    other = open_journal(key)
    assert other.looks() == {}
    assert other.timings() == []
    other.write(Look(Build(UP, Outcome.WRONG_RESULT)))
    assert filled.looks()[UP] == GOOD


def test_what_does_not_count_changes_nothing(filled, open_journal):
    same = RunKey(replace(HERE, driver="580.200.1", moefix="9.9"), LAYER)
    assert open_journal(same).looks() == filled.looks()


def test_the_key_is_the_same_in_every_process():
    code = "from tests.tuning import test_journal as t; print(t.KEY.digest)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    child = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert child.stdout.strip() == KEY.digest


def test_forget_drops_this_key_only(filled, open_journal):
    other = open_journal(OTHERS["Triton"])
    other.write(GOOD)
    filled.forget()
    assert filled.looks() == {}
    assert filled.timings() == []
    assert other.looks() == {UP: GOOD}
    assert open_journal().looks() == {}


# --- damage ----------------------------------------------------------------------------------------------------------


def test_random_bytes_are_set_aside(path, open_journal):
    path.parent.mkdir()
    rubbish = random.Random(5).randbytes(20_000)
    path.write_bytes(rubbish)
    journal = open_journal()
    (note,) = journal.notes
    assert "damaged" in note
    (aside,) = path.parent.glob("journal.sqlite.damaged-*")
    assert aside.read_bytes() == rubbish
    assert aside.name in note
    assert journal.looks() == {}
    journal.write(GOOD)
    journal.close()
    again = open_journal()
    assert (again.notes, again.looks()) == ((), {UP: GOOD})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_journal_is_set_aside(filled, path, open_journal, share):
    for number in range(100):
        filled.write(Look(Build(Kernel(Projection.DOWN, replace(UP.tile, group_m=number + 1)), Outcome.OK)))
    filled.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    journal = open_journal()
    assert len(journal.notes) == 1
    assert len(list(path.parent.glob("*.damaged-*"))) == 1
    journal.write(GOOD)
    assert journal.looks() == {UP: GOOD}


@pytest.mark.parametrize("seed", range(6))
def test_damage_in_the_middle_never_escapes(filled, path, open_journal, seed):
    """Some pages overwritten: the journal is set aside or still readable, but nothing else happens."""
    for number in range(100):
        filled.write(Look(Build(Kernel(Projection.DOWN, replace(UP.tile, group_m=number + 1)), Outcome.OK)))
    filled.close()
    content = bytearray(path.read_bytes())
    chance = random.Random(seed)
    place = chance.randrange(len(content) - 5000)
    content[place : place + 5000] = chance.randbytes(5000)
    path.write_bytes(content)
    journal = open_journal()
    assert len(journal.notes) == 1
    journal.write(GOOD)
    assert journal.looks()[UP] == GOOD


def test_another_schema_is_set_aside(path, open_journal):
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE builds (something TEXT)")
        database.execute("CREATE TABLE runs (other TEXT)")
    database.close()
    journal = open_journal()
    assert "columns" in journal.notes[0]
    journal.write(GOOD)
    assert journal.looks() == {UP: GOOD}


def test_what_sqlite_left_of_a_damaged_journal_does_not_spoil_the_new_one(path, open_journal):
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    path.with_name("journal.sqlite-journal").write_bytes(b"left over" * 1000)
    journal = open_journal()
    journal.write(GOOD)
    journal.close()
    again = open_journal()
    assert (again.notes, again.looks()) == ((), {UP: GOOD})
    assert not path.with_name("journal.sqlite-journal").exists()


def test_a_folder_in_its_place_is_a_clear_error(path):
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match=r"journal\.sqlite"):
        Journal(path, KEY)


READ_ONLY = """
import os, sys
from pathlib import Path
from tests.tuning import test_journal as t
from fixer.base.errors import StoreError
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
path = Path(sys.argv[1])
try:
    journal = t.Journal(path, t.KEY)
    journal.write(t.GOOD)
except StoreError as fault:
    print("refused:", fault.message)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_a_clear_error(exists):
    # pytest's own folders are closed to other users, and root may write everywhere: the child becomes nobody.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        if exists:
            Journal(folder / "journal.sqlite", KEY).close()
        for closed in (folder, folder.parent):
            closed.chmod(0o555)
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", READ_ONLY, str(folder / "journal.sqlite")]
        child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        for opened in (folder.parent, folder):
            opened.chmod(0o755)
    assert child.stdout.startswith("refused:"), child.stderr
    assert "journal.sqlite" in child.stdout


# --- the runner in front of it ---------------------------------------------------------------------------------------


class Counting:
    """A runner that keeps what it was asked."""

    def __init__(self, outcome: Outcome = Outcome.OK) -> None:
        self.looked: list[Request] = []
        self.closer_looked: list[tuple[Kernel, int, int]] = []
        self.outcome = outcome

    def look(self, requests, more=None):
        waiting = list(requests)
        while waiting:
            request = waiting.pop(0)
            self.looked.append(request)
            fine = self.outcome is Outcome.OK
            yield Look(Build(request.kernel, self.outcome), timings(request.kernel, *request.rows) if fine else ())
            if more is not None and not waiting:
                waiting += more()

    def closer(self, wanted, replays):
        for kernel, tokens in wanted:
            self.closer_looked.append((kernel, tokens, replays))
            yield from timings(kernel, tokens, replays=replays)


def test_known_kernels_are_not_asked_again(filled):
    inner = Counting()
    runner = JournaledRunner(inner, filled)
    fresh = Kernel(Projection.DOWN, UP.tile)
    requests = [Request(fresh, (1, 16)), Request(UP, (1, 16)), Request(DOWN, (1, 16))]
    looks = list(runner.look(requests))
    assert inner.looked == [Request(fresh, (1, 16))]
    assert looks[:2] == [GOOD, BAD]  # what is known comes first, a failure as well
    assert len(looks) == 3
    assert runner.resumed == 2
    assert filled.looks()[fresh] == looks[2]


def test_only_missing_rows_are_asked(filled):
    inner = Counting()
    (look,) = JournaledRunner(inner, filled).look([Request(UP, (1, 16, 64))])
    assert inner.looked == [Request(UP, (64,))]
    assert {timing.tokens for timing in look.timings} == {1, 16, 64}
    assert {timing.tokens for timing in filled.looks()[UP].timings} == {1, 16, 64}
    again = Counting()
    list(JournaledRunner(again, filled).look([Request(UP, (1, 16, 64))]))
    assert again.looked == []


def test_a_further_round_is_split_alike(filled):
    """What the runner asks for early: the known part comes from the journal, the rest is measured, none is lost."""
    fresh, later = Kernel(Projection.DOWN, UP.tile), Kernel(Projection.GATE_UP, DOWN.tile)
    rounds = [[Request(UP, (1, 16)), Request(later, (1,))], [Request(DOWN, (1,))], []]
    inner = Counting()
    looks = list(JournaledRunner(inner, filled).look([Request(fresh, (1,))], lambda: rounds.pop(0)))
    assert inner.looked == [Request(fresh, (1,)), Request(later, (1,))]
    assert sorted(look.build.kernel.projection.value for look in looks) == ["down", "down", "gate_up", "gate_up"]
    assert {look.build.kernel for look in looks} == {fresh, UP, later, DOWN}


def test_a_kernel_that_was_good_and_now_crashes_is_not_good(filled):
    inner = Counting(Outcome.CRASHED)
    (look,) = JournaledRunner(inner, filled).look([Request(UP, (1, 64))])
    assert (look.build.outcome, look.timings) == (Outcome.CRASHED, ())
    assert filled.looks()[UP] == look
    assert filled.timings() == []


def test_a_kernel_without_sensible_rows_is_asked_once(open_journal):
    journal = open_journal()
    first, second = Counting(), Counting()
    list(JournaledRunner(first, journal).look([Request(UP, ())]))
    list(JournaledRunner(second, journal).look([Request(UP, ())]))
    assert (len(first.looked), len(second.looked)) == (1, 0)


def test_closer_looks_are_not_repeated(filled):
    wanted = [(UP, 1), (UP, 16)]
    (known,) = timings(UP, 16, replays=7)
    filled.write_timing(known)
    inner = Counting()
    answers = list(JournaledRunner(inner, filled).closer(wanted, 7))
    assert inner.closer_looked == [(UP, 1, 7)]
    assert answers[0] == known
    assert len(answers) == 2
    again = Counting()
    assert sorted(JournaledRunner(again, filled).closer(wanted, 7), key=lambda t: t.tokens) == sorted(
        answers, key=lambda t: t.tokens
    )
    assert again.closer_looked == []
    list(JournaledRunner(again, filled).closer(wanted, 17))  # more replays are another look
    assert again.closer_looked == [(UP, 1, 17), (UP, 16, 17)]


def test_each_answer_is_on_disk_before_it_is_given(open_journal):
    journal, reader = open_journal(), open_journal()
    for look in JournaledRunner(Counting(), journal).look([Request(UP, (1,)), Request(DOWN, (1,))]):
        assert reader.looks()[look.build.kernel] == look
    for timing in JournaledRunner(Counting(), journal).closer([(UP, 1), (UP, 2)], 7):
        assert timing in reader.timings()
