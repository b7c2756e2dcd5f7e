from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from fixer.base import progress
from fixer.base.progress import PlainLines, Silent, Transfer, gigabytes, tell, terminal_progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_plain_lines_come_now_and_then_with_what_is_left(clock):
    out = io.StringIO()
    lines = PlainLines(out)
    lines.phase("search", 40)
    for _ in range(10):
        clock.now += 1
        lines.advance("gate_up 16x64x128")
    assert out.getvalue().splitlines() == [
        "moefix: search ...",
        "moefix: search: 5 of 40, about 35 s left; gate_up 16x64x128",
        "moefix: search: 10 of 40, about 30 s left; gate_up 16x64x128",
    ]


def test_more_steps_than_expected_and_a_corrected_total(clock):
    out = io.StringIO()
    lines = PlainLines(out)
    lines.phase("finals", 1)
    for total in (None, None, 9, None):
        clock.now += 6
        lines.advance(total=total)
    assert out.getvalue().splitlines()[1:] == [
        "moefix: finals: 1 of 1, about 0 s left",
        "moefix: finals: 2 of 2, about 0 s left",
        "moefix: finals: 3 of 9, about 36 s left",
        "moefix: finals: 4 of 9, about 30 s left",
    ]


def test_a_new_phase_counts_anew(clock):
    out = io.StringIO()
    lines = PlainLines(out)
    lines.phase("search", 2)
    clock.now += 100
    lines.advance()
    lines.phase("finals", 3)
    clock.now += 7
    lines.advance()
    assert out.getvalue().splitlines()[-2:] == ["moefix: finals ...", "moefix: finals: 1 of 3, about 14 s left"]


def test_a_phase_without_steps_is_one_line(clock):
    out = io.StringIO()
    PlainLines(out).phase("compiling for the server", 0)
    assert out.getvalue() == "moefix: compiling for the server ...\n"


def test_quiet_says_nothing(capfd):
    with terminal_progress(quiet=True) as quiet:
        assert isinstance(quiet, Silent)
        quiet.phase("search", 3)
        quiet.advance("x")
        quiet.note("y")
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_there_are_plain_lines_on_standard_error(capfd):
    with terminal_progress() as plain:
        assert isinstance(plain, PlainLines)
        plain.phase("search", 3)
        plain.note("found [bold]it[/bold]")
    assert capfd.readouterr() == ("", "moefix: search ...\nmoefix: found [bold]it[/bold]\n")


@pytest.mark.parametrize("fault", [BrokenPipeError, OSError, ValueError])
def test_a_line_that_cannot_be_written_stops_nothing(clock, monkeypatch, fault):
    class Broken(io.StringIO):
        def write(self, text):
            raise fault

        def isatty(self):
            raise fault

    for stream in (Broken(), None):
        monkeypatch.setattr("sys.stderr", stream)
        tell("x")
        with terminal_progress() as plain:
            plain.phase("search", 2)
            clock.now += 100
            plain.advance("x")
            plain.note("y")
        far = Transfer("download", now=clock.monotonic)
        clock.now += 100
        far.update(1, 2)


BAR = """
from fixer.base.progress import terminal_progress
with terminal_progress() as bar:
    assert type(bar).__name__ == "_Bar", bar
    bar.phase("search", 2)
    bar.advance("gate_up 16x64")
    bar.note("a note with [brackets]")
    bar.advance(total=3)
    bar.phase("finals", 1)
    bar.advance("M=1")
print("end")
"""


def on_a_terminal(program):
    """What a program shows there; it must end well and print "end"."""
    import os
    import pty

    master, terminal = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", program], env=environ, stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert child.communicate(timeout=30)[0] == b"end\n"
    assert child.returncode == 0
    return shown.decode()


def test_on_a_terminal_there_is_a_bar():
    text = on_a_terminal(BAR)
    assert "moefix: a note with [brackets]" in text
    assert "finals" in text


# --- a transfer ------------------------------------------------------------------------------------------------------


def transfer(clock, **more):
    out = io.StringIO()
    return out, Transfer("download", stream=out, now=clock.monotonic, **more)


def test_a_transfer_says_how_fast_and_how_long(clock):
    out, shown = transfer(clock)
    for second in range(12):
        shown.update(10**9 * (10 + second), 60 * 10**9)
        clock.now += 1
    assert out.getvalue().splitlines() == [
        "moefix: download: 15.0 of 60.0 GB, 1000 MB/s, about 45 s left",
        "moefix: download: 20.0 of 60.0 GB, 1000 MB/s, about 40 s left",
    ]


def test_the_rate_is_that_of_the_last_seconds(clock):
    _, shown = transfer(clock)
    for done in (0, 9 * 10**9, 9 * 10**9, 9 * 10**9):
        shown.update(done, 10**10)
        clock.now += 8
    assert shown.line(9 * 10**9, 10**10) == "download: 9.0 of 10.0 GB, 0 MB/s"


def test_a_quiet_transfer_says_nothing(clock):
    out, shown = transfer(clock, quiet=True)
    for _ in range(9):
        clock.now += 9
        shown.update(1, 2)
    assert out.getvalue() == ""


def test_gigabytes():
    assert [gigabytes(count) for count in (0, 12_345_678, 12_345_678_901)] == ["0.000 GB", "0.012 GB", "12.3 GB"]


TWO_BARS = """
from fixer.base.progress import Transfer, terminal_progress
shown = Transfer("download")
shown.update(1, 10)  # nothing is on the screen
with terminal_progress() as bar:
    bar.phase("search", 2)
    shown.update(3 * 10**9, 10**10)
    bar.advance()
with terminal_progress():
    shown.update(7 * 10**9, 10**10)
print("end")
"""


def test_on_a_terminal_a_transfer_has_a_bar_of_its_own():
    text = on_a_terminal(TWO_BARS)
    assert "search" in text
    assert "3000/10000" in text
    assert "7000/10000" in text
    assert text.count("download (MB)") >= 2
