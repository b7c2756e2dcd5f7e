"""What goes wrong on real machines, with real processes: entrypoint.py, and stand-ins for card, driver, SGLang."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fixer.artefacts.check_files import misfit
from fixer.artefacts.shelf import artefact_path
from fixer.base.errors import CompileError
from fixer.kernel.compile import Compiled, CompileOutcome
from fixer.sglang.tuning_files import render_table
from fixer.tuning.journal import _COLUMNS
from fixer.workload import RowTiles, Tile
from tests.support import fakes
from tests.support.serving import FOLDER, H100, LARGE, SMALL, installed
from tests.support.tuning_machine import ROOT, TESTS, TOKEN, TuningMachine, machine, model_folders, undisturbed  # noqa: F401

UP = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3.json"
DOWN = "E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3_down.json"
TOO_LARGE = Tile(128, 256, 128, 8, 8, 4)
"""In bf16 it needs 294912 bytes of shared memory, more than any card has."""
LARGE_TOO = Tile(128, 64, 64, 8, 4, 2)
"""Of the same BLOCK_SIZE_M, and fits."""


def contents(folder: Path) -> set[bytes]:
    """The content of every file below a folder."""
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_tuning_that_nothing_disturbs(machine, undisturbed):
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    assert len(undisturbed) >= 18
    once = machine.timed()
    assert once > 100
    assert machine.run().served
    assert machine.timed() == once


SIGNAL_ROUNDS = 16


def test_a_signal_at_any_moment_ends_all_within_two_seconds(machine, undisturbed, capsys):
    """SIGTERM and Ctrl-C while tuning, at random moments, with the real compiler: everything kept, nothing left."""
    chance, took = random.Random(5), []
    machine.env |= {fakes.INSTANT: "", fakes.PAUSE: "0.003"}
    for turn in range(SIGNAL_ROUNDS):
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        process = machine.start()
        # From the first word on: importing, planning, starting children, compiling, measuring.
        first = process.stderr.readline()
        time.sleep(chance.random() ** 2 * 5)
        if process.poll() is not None:  # it had come to its end: the next one has nothing to go on from
            process.communicate()
            clear(machine.home)
            continue
        everything = machine.processes()
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode in (41, -number) and machine.kept():  # it had just become the server
            clear(machine.home)
            continue
        took.append(time.monotonic() - began)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], first + err
        assert "Traceback" not in err, err
        assert fakes.eventually(lambda gone=everything: not (machine.processes() & gone), 2)
    assert len(took) >= SIGNAL_ROUNDS // 2
    with capsys.disabled():
        print(
            f"\n[signals while tuning: {len(took)}, seconds to the exit: median {statistics.median(took):.2f},"
            f" most {max(took):.2f}] ",
            end="",
        )
    assert max(took) < 2
    if (machine.home / "journal.sqlite").exists():
        journal = sqlite3.connect(machine.home / "journal.sqlite")
        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        journal.close()
    result = machine.run(env={fakes.INSTANT: "1", fakes.PAUSE: "0"})
    assert result.served, result.err
    assert machine.kept().keys() == undisturbed.keys()


TERMINAL_ROUNDS = 24


def test_a_terminals_ctrl_c_shows_no_childs_traceback(machine):
    """A terminal sends SIGINT to every process of its foreground group, also to those that are still starting."""
    machine.env |= {fakes.PAUSE: "0.02"}
    codes = []
    for turn in range(TERMINAL_ROUNDS):
        process = machine.start(start_new_session=True)
        assert process.stderr.readline()
        time.sleep(turn * 0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        assert "Traceback" not in err, f"round {turn}: {err}"
        assert fakes.eventually(lambda: not machine.processes(), 10), turn
    assert codes == [130] * TERMINAL_ROUNDS


# --- two on one volume -----------------------------------------------------------------------------------------------


def test_two_on_one_volume_tune_once(machine, undisturbed, tmp_path):
    machine.env |= {fakes.PAUSE: "0.003"}
    records = [tmp_path / "record-1", tmp_path / "record-2"]
    both = [machine.start(env={"RECORD": str(record)}) for record in records]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [41, 41], said
    assert all(record.exists() for record in records)
    (waited,) = [text for text in said if "another moefix is tuning on this volume (process" in text]
    assert "another moefix has tuned this" in waited
    assert "searched" not in waited
    assert fakes.repeated(machine.log) == []
    assert machine.kept() == undisturbed


def test_a_lock_of_a_dead_process_does_not_block(machine, undisturbed):
    machine.env |= {fakes.PAUSE: "0.01"}
    first = machine.start()
    assert fakes.eventually(lambda: machine.timed() > 5, 60)
    assert list(machine.home.glob("locks/*.lock"))
    first.kill()
    first.communicate()
    machine.env |= {fakes.PAUSE: "0"}
    result = machine.run()
    assert result.served
    assert "another moefix" not in result.err
    assert machine.kept() == undisturbed


def test_one_that_waits_can_be_ended(machine):
    machine.env |= {fakes.PAUSE: "0.05"}
    first = machine.start()
    assert fakes.eventually(lambda: machine.timed() > 2, 60)
    second = machine.start()
    line = ""
    while "another moefix is tuning" not in line:
        line = second.stderr.readline()
        assert line
    began = time.monotonic()
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert second.returncode == 143
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=30)


# --- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str):
    """A small file system of its own at a folder; only root can."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode()[:80]}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def clear(home: Path) -> None:
    for path in home.iterdir():
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize("kib", [8, 64, 128, 400])
def test_a_full_data_folder_does_not_keep_the_server_from_starting(machine, undisturbed, kib):
    clear(machine.home)
    tree = machine.files()
    with mounted(machine.home, "-o", f"size={kib}k"):
        result = machine.run()
        assert result.served, result.err
        assert "No space left" in result.err or "full" in result.err or kib == 400
        kept = machine.kept()
        assert kept in (None, undisturbed)
        if "serving with SGLang's own configuration" in result.err:
            assert machine.files() == tree
        # Room again: it goes on from what there is.
        subprocess.run(["mount", "-o", "remount,size=64m", str(machine.home)], check=True)
        result = machine.run()
        assert result.served, result.err
        assert machine.kept() == undisturbed


def test_a_full_data_folder_is_an_error_if_strict(machine):
    clear(machine.home)
    with mounted(machine.home, "-o", "size=64k"):
        result = machine.run(*machine.flags, "--moefix-strict")
        assert (result.code, result.record) == (9, None)


def test_a_read_only_volume_keeps_nothing_and_serves_tuned(machine, undisturbed):
    clear(machine.home)
    with mounted(machine.home, "-o", "size=1m,ro"):
        result = machine.run()
        assert result.served, result.err
        assert "nothing is kept for the next start" in result.err
        assert (machine.package / FOLDER / UP).is_file()
        strict = machine.run(*machine.flags, "--moefix-strict")
        assert (strict.code, strict.record) == (9, None)


def test_a_read_only_volume_and_a_read_only_tree(machine, no_write_as_root):
    clear(machine.home)
    closed = [machine.package, *(path for path in machine.package.rglob("*") if path.is_dir())]
    tree = machine.files()
    with mounted(machine.home, "-o", "size=1m,ro"):
        for folder in closed:
            folder.chmod(0o555)
        result = machine.run(preexec_fn=no_write_as_root)
        for folder in closed:
            folder.chmod(0o755)
    assert result.served, result.err
    overlay = Path(result.record["env"]["SGLANG_MOE_CONFIG_DIR"])
    assert (overlay / "configs" / "triton_3_6_0" / UP).is_file()  # it outlived moefix: the server reads it
    assert machine.files() == tree
    shutil.rmtree(overlay.parents[1])


def test_a_passing_folder_goes_where_no_server_needs_it(machine, tmp_path):
    clear(machine.home)
    (tmp_path / "tmp").mkdir()
    with mounted(machine.home, "-o", "size=1m,ro"):
        result = machine.run(*machine.flags, "--moefix-dry-run", env={"TMPDIR": str(tmp_path / "tmp")})
    assert result.code == 0, result.err
    assert list((tmp_path / "tmp").iterdir()) == []


# --- clocks ----------------------------------------------------------------------------------------------------------

JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) {  /* between six years back and six ahead, another one at every look */
    static unsigned state = 12345;
    state = state * 1103515245u + 12345u;
    return (long)(state >> 4) % 400000000L - 200000000L;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_clock_that_jumps_by_years_changes_nothing(machine, undisturbed, tmp_path):
    library = tmp_path / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=JUMPING_CLOCK, text=True, check=True)
    look = "import time; print(len({time.time() // 1e6 for _ in range(9)}))"
    seen = subprocess.run(
        [sys.executable, "-c", look], env={"LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True
    )
    assert int(seen.stdout) > 3, "the clock does not jump"
    machine.env |= {"LD_PRELOAD": str(library)}
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    once = machine.timed()
    for years in (-30, 30):  # and what is kept seems to be of another time
        for path in (*machine.home.rglob("*"), *machine.package.rglob("E=8*")):
            os.utime(path, (time.time() + years * 3e7,) * 2, follow_symlinks=False)
        result = machine.run()
        assert result.served, result.err
        assert "nothing to measure" in result.err
    assert machine.timed() == once
    assert not list(machine.home.rglob("*damaged*"))


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_form(content: bytes) -> bytes:
    return b"SQLite format 3\x00" + content[16:40] + bytes(2000)


JOURNAL_DAMAGE = {
    "cut": cut,
    "text": lambda content: b"this is no database at all\n" * 99,
    "zeros": lambda content: bytes(len(content)),
    "header only": other_form,
    "page overwritten": lambda content: content[:4096] + b"\xff" * 4096 + content[8192:],
}


@pytest.mark.parametrize("how", JOURNAL_DAMAGE)
def test_a_damaged_journal_is_set_aside_and_begun_anew(machine, undisturbed, how):
    machine.run()
    shutil.rmtree(machine.home / "artefacts")
    journal = machine.home / "journal.sqlite"
    damaged = JOURNAL_DAMAGE[how](journal.read_bytes())
    journal.write_bytes(damaged)
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    (aside,) = machine.home.glob("journal.sqlite.damaged-*")
    assert aside.read_bytes() == damaged
    assert aside.name in result.err
    database = sqlite3.connect(journal)
    assert database.execute("SELECT count(*) FROM builds").fetchone()[0] > 0
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE builds SET outcome = 'splendid' WHERE rowid % 7 = 0",
        "UPDATE builds SET tile = 'a b ' || rowid WHERE rowid % 7 = 0",
        "UPDATE builds SET tile = '999999 16 16 1 4 ' || rowid WHERE rowid % 7 = 0",
        "UPDATE timings SET microseconds = -1e300 WHERE rowid % 11 = 0",
        "UPDATE timings SET least = 9e999 WHERE rowid % 11 = 0",
        "UPDATE timings SET replays = -rowid",
    ],
)
def test_a_journal_with_values_that_nobody_wrote(machine, undisturbed, change):
    machine.run()
    shutil.rmtree(machine.home / "artefacts")
    journal = machine.home / "journal.sqlite"
    database = sqlite3.connect(journal)
    assert [row[1] for row in database.execute("PRAGMA table_info(builds)")] == _COLUMNS["builds"].split()
    with database:
        database.execute(change)
    database.close()
    damaged = journal.read_bytes()
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    (aside,) = machine.home.glob("journal.sqlite.damaged-*")
    assert aside.read_bytes() == damaged


ARTEFACT_DAMAGE = {
    "cut": cut,
    "empty": lambda content: b"",
    "flipped bit": flip,
    "not JSON": lambda content: b"<html>502 Bad Gateway</html>",
    "wrong types": lambda content: content.replace(b'"experts": 8', b'"experts": "8"'),
    "absurd tile": lambda content: content.replace(b'"BLOCK_SIZE_N": 64', b'"BLOCK_SIZE_N": 65536'),
    "binary": lambda content: bytes(range(256)) * 8,
    "too long": lambda content: content + b" " * (2 << 20),
    "nested": lambda content: b"[" * 100000,
}


@pytest.mark.parametrize("how", ARTEFACT_DAMAGE)
def test_a_damaged_artefact_is_set_aside_and_measured_again(machine, undisturbed, how):
    machine.run()
    (path,) = machine.home.glob("artefacts/*/*.json")
    damaged = ARTEFACT_DAMAGE[how](path.read_bytes())
    path.write_bytes(damaged)
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes() == damaged
    assert aside.name in result.err


GOOD = render_table({1: SMALL, 64: LARGE, 4096: LARGE})
TABLE_DAMAGE = {
    "cut": cut(GOOD),
    "empty": b"",
    "not JSON": b"<html>502 Bad Gateway</html>",
    "no object": b"[1, 2]",
    "no rows": b"{}",
    "wrong types": GOOD.replace(b": 64,", b': "64",'),
    "no number": GOOD.replace(b'"4096"', b'"many"'),
    "negative": GOOD.replace(b'"num_stages": 4', b'"num_stages": -4'),
    "absurd tile": GOOD.replace(b'"BLOCK_SIZE_N": 128', b'"BLOCK_SIZE_N": 65536'),
    "no power of two": GOOD.replace(b'"BLOCK_SIZE_N": 128', b'"BLOCK_SIZE_N": 96'),
    "unknown option": GOOD.replace(b'"num_warps"', b'"num_wraps"'),
    "binary": bytes(range(256)) * 8,
    "too long": GOOD + b" " * (2 << 20),
    "nested": b"[" * 100000,
    "twice": b'{"1": {}, "1": {}}',
}
BAD_TABLES = TABLE_DAMAGE | {"overflows": render_table({1: SMALL, 64: TOO_LARGE})}


@pytest.mark.parametrize("which", [UP, DOWN])
@pytest.mark.parametrize("how", BAD_TABLES)
def test_a_bad_tuning_file_is_set_aside_before_the_server_starts(machine, how, which):
    folder = machine.package / FOLDER
    folder.mkdir(exist_ok=True)
    before = machine.files()
    if which == DOWN:
        (folder / UP).write_bytes(GOOD)
    (folder / which).write_bytes(BAD_TABLES[how])
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served, result.err
    assert not (folder / which).exists()
    (aside,) = folder.glob(which + ".damaged-*")
    assert aside.read_bytes() == BAD_TABLES[how]
    assert f"{which} is not used" in result.err
    assert aside.name in result.err
    assert "SGLang's own configuration, which fits this card" in result.err
    if how == "overflows":
        assert "bytes of shared memory a block, and the card has 232448" in result.err
    rest = {name: state for name, state in machine.files().items() if Path(name).name not in (UP, aside.name)}
    assert rest == before


@pytest.mark.parametrize("how", ["cut", "empty", "wrong types", "absurd tile", "too long", "nested"])
def test_a_damaged_tuning_file_does_not_keep_from_tuning(machine, undisturbed, how):
    folder = machine.package / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / UP).write_bytes(TABLE_DAMAGE[how])
    result = machine.run()
    assert result.served, result.err
    assert machine.kept() == undisturbed
    (aside,) = folder.glob(UP + ".damaged-*")
    assert aside.read_bytes() == TABLE_DAMAGE[how]
    assert aside.name in result.err
    # moefix's own, damaged afterwards: back to what was tuned, and what was there is kept.
    (folder / DOWN).write_bytes(TABLE_DAMAGE[how] + b" ")
    result = machine.run()
    assert result.served, result.err
    assert TABLE_DAMAGE[how] + b" " in contents(folder)
    assert "nothing to measure" in result.err
    assert (folder / DOWN).read_bytes() != TABLE_DAMAGE[how] + b" "


def test_a_bad_file_of_another_triton_is_hidden_or_moved(machine):
    other = machine.package / FOLDER.replace("3_6_0", "3_1_0")
    other.mkdir(exist_ok=True)
    (other / UP).write_bytes(BAD_TABLES["overflows"])
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served, result.err
    assert (other / UP).read_bytes() == BAD_TABLES["overflows"]  # right for that Triton, perhaps
    assert "was not measured" in result.err
    assert (machine.package / FOLDER / UP).is_file()
    for name in (UP, DOWN):
        (machine.package / FOLDER / name).unlink()
    (other / UP).write_bytes(b"{")
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served, result.err
    assert len(list(other.glob(UP + ".damaged-*"))) == 1


@pytest.mark.parametrize("how", ["cut", "overflows"])
def test_a_bad_file_in_a_read_only_tree_is_hidden_by_an_overlay(machine, how, no_write_as_root):
    folder = machine.package / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / UP).write_bytes(BAD_TABLES[how])
    tree = machine.files()
    closed = [machine.package, *(path for path in machine.package.rglob("*") if path.is_dir())]
    for each in closed:
        each.chmod(0o555)
    try:
        results = [machine.run(*machine.flags, "--moefix-skip-tune", preexec_fn=no_write_as_root) for _ in range(2)]
    finally:
        for each in closed:
            each.chmod(0o755)
    assert machine.files() == tree
    for result in results:
        assert result.served, result.err
        overlay = Path(result.record["env"]["SGLANG_MOE_CONFIG_DIR"])
        rows = json.loads((overlay / "configs" / "triton_3_6_0" / UP).read_text())
        assert "4096" in rows
        assert rows != json.loads(GOOD)
        assert "it could not be moved aside" in result.err


def test_a_bad_file_of_the_users_own_folder(machine, tmp_path):
    own = tmp_path / "mine" / "configs" / "triton_3_6_0"
    own.mkdir(parents=True)
    (own / UP).write_bytes(BAD_TABLES["absurd tile"])
    tree = machine.files()
    result = machine.run(*machine.flags, "--moefix-skip-tune", env={"SGLANG_MOE_CONFIG_DIR": str(tmp_path / "mine")})
    assert result.served, result.err
    assert [path.read_bytes() for path in own.glob("*.damaged-*")] == [BAD_TABLES["absurd tile"]]
    assert machine.files() == tree


def test_a_file_of_the_users_that_overflows_gives_way_to_what_was_tuned(machine):
    artefact = machine.artefact()
    folder = machine.package / FOLDER
    machine.run()
    for content in (BAD_TABLES["overflows"], render_table({1: LARGE})):  # the second one is sound, and not moefix's
        (folder / UP).write_bytes(content)
        result = machine.run()
        assert result.served, result.err
        assert installed(machine, artefact)
        assert content in contents(folder)


def test_a_tile_that_ends_the_compiler_is_the_tiles_fault_only_where_others_compile(machine):
    artefact = machine.artefact()
    good, dead = Compiled(CompileOutcome.OK, 4096, 0.1), Compiled(CompileOutcome.CRASHED, 0, 0.1, "the compiler died")

    def crashes_at_some(candidates):
        return {candidate: dead if candidate.tile == LARGE else good for candidate in candidates}

    assert "cannot be compiled: crashed" in misfit(artefact, H100, crashes_at_some)
    with pytest.raises(CompileError):
        misfit(artefact, H100, lambda candidates: dict.fromkeys(candidates, dead))
    assert misfit(artefact, H100, lambda candidates: dict.fromkeys(candidates, good)) == ""


def test_what_moefix_wrote_itself_leaves_no_trail(machine):
    artefact = machine.artefact()
    machine.run()
    before = {path.name for path in (machine.package / FOLDER).iterdir()}
    newer = replace(
        artefact, rows=tuple(replace(row, tiles=RowTiles(LARGE, LARGE)) for row in artefact.rows), seconds=31.0
    )
    path = artefact_path(machine.home, artefact.environment, artefact.workload)
    path.write_text(newer.to_json())
    assert machine.run().served
    assert installed(machine, newer)
    assert {path.name for path in (machine.package / FOLDER).iterdir()} == before


def test_a_second_check_of_files_compiles_nothing(machine):
    """The compiler's answers are kept: with the compiler out of reach the second start still knows that it fits."""
    assert machine.run(*machine.flags, "--moefix-skip-tune").served
    broken = machine.site / "triton"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise AssertionError('imported')\n")
    result = machine.run(*machine.flags, "--moefix-skip-tune")
    assert result.served, result.err
    assert "which fits this card" in result.err


# --- an artefact of another environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"triton": "3.5.1"}, "Triton was 3.5.1, is 3.6.0"),
        ({"sglang": "0.5.16"}, "SGLang was 0.5.16, is 0.5.17"),
        ({"card": "NVIDIA H200"}, "card was NVIDIA H200, is NVIDIA H100 80GB HBM3"),
        ({"capability": (8, 9)}, "compute capability was 8.9, is 9.0"),
        ({"shared_memory": 101376}, "shared memory limit was 101376, is 232448"),
        ({"driver": "570.1"}, "driver was 570, is 580"),
        ({"kernel_hash": "cd" * 32}, "kernel source was cdcdcdcdcdcd, is "),
        ({"driver": "570.1", "triton": "3.5.1"}, "driver was 570, is 580; Triton was 3.5.1, is 3.6.0"),
    ],
)
def test_an_artefact_of_another_environment_is_named_and_not_used(machine, undisturbed, change, said):
    machine.artefact(**change)
    result = machine.run()
    assert result.served, result.err
    assert said in result.err
    assert "searched" in result.err
    rows = json.loads((machine.package / FOLDER / UP).read_text())
    assert {str(Tile.from_json(row)) for row in rows.values()} != {str(SMALL), str(LARGE)}


# --- a card that others use ------------------------------------------------------------------------------------------


def test_a_busy_card_is_said_before_tuning_starts(machine, undisturbed):
    result = machine.run(env={"FAKE_BUSY": "93", "FAKE_HOLDERS": "4242:2000"})
    assert result.served, result.err
    line = next(line for line in result.err.splitlines() if "93 % busy" in line)
    assert "process 4242 (python3) with 2000 MiB" in line
    assert "less certain" in line
    assert result.err.index("93 % busy") < result.err.index("search ...")
    assert machine.kept() == undisturbed


def test_a_nearly_full_card_takes_smaller_weights_and_says_so(machine, models):
    whole = models["q3_30b_bf16_tp1_h100"] / "config.json"  # whose layer has 1.2 GiB of weights
    (machine.model / "config.json").write_bytes(whole.read_bytes())
    environ = {"FAKE_USED_MIB": str(81559 - 1500), "FAKE_HOLDERS": "4242:80000"}
    result = machine.run(env=environ)
    assert result.served, result.err
    line = next(line for line in result.err.splitlines() if "MiB are free on" in line)
    assert "1500 of 81559 MiB" in line
    assert "process 4242 (python3) with 80000 MiB" in line
    assert "smaller weights" in line
    assert "bare kernels" in result.err
    assert result.err.index(line) < result.err.index("search ...")


def test_a_full_card_stops_tuning_and_not_the_server(machine):
    environ = {"FAKE_USED_MIB": str(81559 - 300), "FAKE_HOLDERS": "4242:81000"}
    result = machine.run(env=environ)
    assert result.served, result.err
    assert "Too little to tune: 300 of 81559 MiB are free" in result.err
    assert "process 4242 (python3)" in result.err
    assert "which fits this card" in result.err
    strict = machine.run(*machine.flags, "--moefix-strict", env=environ)
    assert (strict.code, strict.record) == (4, None)
    tune = machine.run("tune", *machine.flags, env=environ)
    assert tune.code == 4
    assert not machine.timed()


# --- what nobody foresaw ---------------------------------------------------------------------------------------------


def test_an_unforeseen_error_is_a_warning_and_the_server_starts(machine):
    environ = {fakes.BROKEN: f"list index out of range at https://x:{TOKEN}@hub\nsecond line"}
    result = machine.run(env=environ)
    assert result.served, result.err
    assert "an error in moefix itself: RuntimeError: list index out of range" in result.err
    assert "second line" not in result.err
    assert "which fits this card" in result.err
    strict = machine.run(*machine.flags, "--moefix-strict", env=environ)
    assert (strict.code, strict.record) == (8, None)


def test_an_unforeseen_error_where_sglangs_own_does_not_fit(machine):
    result = machine.run(*machine.flags, "--moefix-smem-limit=16000", env={fakes.BROKEN: "oh"})
    assert result.served, result.err
    assert "was not measured" in result.err
    assert (machine.package / FOLDER / UP).is_file()


def test_a_release_with_one_joint_file_is_tuned_for_it(tmp_path, trees, driver, models, compiled):
    machine = TuningMachine(tmp_path, trees["0.4.9"].package, driver, models, compiled)
    folder = machine.package / "srt/layers/moe/fused_moe_triton/configs/triton_3_6_0"
    first = machine.run()
    assert first.served, first.err
    assert "tuned 20 batch sizes" in first.err
    rows = (folder / UP).read_bytes()
    assert "4096" in json.loads(rows)
    assert not (folder / DOWN).exists()
    second = machine.run()
    assert second.served, second.err
    assert "tuned before" in second.err
    assert (folder / UP).read_bytes() == rows


def test_no_token_anywhere(machine):
    machine.run()
    for path in (*machine.home.rglob("*"), *machine.package.rglob("*")):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


NO_CAPABILITY = """
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_no_capability_is_needed(machine, undisturbed):
    """As in `docker run --cap-drop ALL`: root without any of root's powers."""
    if os.geteuid() != 0:
        pytest.skip("this user has no capability anyway")
    look = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')][0])"
    without = [sys.executable, "-c", NO_CAPABILITY]
    seen = subprocess.run([*without, "-c", look], capture_output=True, text=True, check=True)
    assert int(seen.stdout, 16) == 0
    command = [*without, str(TESTS / "support" / "fake_entry.py"), *machine.flags]
    done = subprocess.run(command, env=machine.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 41, done.stderr
    assert machine.kept() == undisturbed
