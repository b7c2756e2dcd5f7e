"""Reading along, without processes: lines cut from pieces, and what is said and kept of them."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.serve.log import diagnose
from fixer.serve.log.read_log import HISTORY, LINE_CAP, Lines, Reader
from fixer.serve.log.settings import Settings
from tests.support.log_lines import DOWN, EXPECTED, READY, STAMP, UP, using

MARK = re.compile(b"MARK")


def cut(pieces):
    lines = Lines(MARK)
    found = [line for piece in pieces for line, _ in lines.take(piece)]
    return found + [line for line, _ in lines.last()]


@given(st.lists(st.sampled_from([b"a", b"\n", b"MA", b"RK", b"MARK", b"\0", b"\xff\r"]), max_size=40), st.data())
def test_every_line_with_a_marker_is_found_however_it_comes(parts, data):
    whole, pieces = b"".join(parts), []
    while whole and len(pieces) < 50:
        size = data.draw(st.integers(1, len(whole)))
        pieces.append(whole[:size])
        whole = whole[size:]
    pieces.append(whole)
    whole = b"".join(parts)
    assert cut(pieces) == [line for line in whole.split(b"\n") if b"MARK" in line]


def test_what_stands_around_a_gap_is_no_line():
    lines = Lines(MARK)
    assert not list(lines.take(b"a MARK and the rest is "))
    found = [line for line, _ in lines.take(b"lost MARK\nb MARK\nc MA", gap=True)]
    assert found == [b"b MARK"]
    assert [line for line, _ in lines.take(b"RK\n")] == [b"c MARK"]
    assert not list(lines.take(b"no end", gap=True))
    assert not list(lines.take(b" MARK\n"))
    assert [line for line, _ in lines.take(b"d MARK\n")] == [b"d MARK"]


@pytest.mark.parametrize("pieces", [[b"x" * 1000] * 500, [b"x" * 200_000], [b"MARK" * 50_000]])
def test_a_line_without_bounds_is_passed_over(pieces):
    lines = Lines(MARK)
    for piece in pieces:
        assert not list(lines.take(piece))
        assert len(lines._carry) <= LINE_CAP
    assert not list(lines.take(b"MARK\n"))
    assert [line for line, _ in lines.take(b"MARK\n")] == [b"MARK"]
    assert not list(lines.take(b"MARK" * 50_000 + b"\n"))


def test_the_lines_above_come_from_earlier_pieces_too():
    lines = Lines(MARK)
    for number in range(1000):
        assert not list(lines.take(b"line %d\n" % number))
    ((line, above),) = lines.take(b"before\nMARK\nafter\n")
    assert line == b"MARK"
    frames = list(above)
    assert frames[:3] == [b"before", b"line 999", b"line 998"]
    assert len(frames) == diagnose.FRAMES


def test_what_is_kept_of_the_past_is_bounded():
    lines = Lines(MARK)
    for _ in range(200):
        assert not list(lines.take(b"x" * 60_000 + b"\n"))
    assert sum(map(len, lines._blocks)) <= HISTORY + 60_001


class Heard:
    """A reader, what it said and what it kept."""

    def __init__(self, **settings) -> None:
        self.said, self.kept = [], []
        self.reader = Reader(Settings(EXPECTED, **settings), self.said.append, self.kept.append)

    def take(self, *lines, output=1, gap=False):
        self.reader.take(output, "".join(f"{line}\n" for line in lines).encode(), gap=gap)
        self.reader.news()


def test_a_verdict_is_said_and_kept():
    heard = Heard()
    heard.take(STAMP + using(UP), STAMP + using(DOWN), STAMP + READY)
    text = f"SGLang picked up both files: {UP} and {DOWN}"
    assert heard.said == [text]
    assert heard.kept == [{"verdict": text}, {"detail": "SGLang is ready"}]
    assert Heard(quiet=True).said == []


def test_an_error_waits_for_its_reason_and_is_said_when_none_comes(monkeypatch):
    heard = Heard(card="X")
    heard.take("    fused_moe_kernel[grid](", "triton.compiler.errors.CompilationError: at 1:0:")
    assert heard.said == []
    now = time.monotonic()
    assert now < heard.reader.wakes_at <= now + diagnose.PATIENCE
    monkeypatch.setattr("time.monotonic", lambda: now + 2)
    heard.reader.news()
    assert "Triton cannot compile it" in heard.said[0]


def test_the_end_says_what_is_left():
    heard = Heard()
    heard.take("triton.compiler.errors.CompilationError: at 1:0:")
    heard.reader.take(1, (STAMP + READY).encode(), gap=False)  # without a line's end
    heard.reader.end()
    assert "never looked" in heard.said[0]
    assert "Triton cannot compile it" in heard.said[1]


def test_after_a_gap_nothing_is_said_that_rests_on_what_was_not_there():
    heard = Heard()
    heard.take("x", gap=True)
    heard.take(STAMP + READY)
    assert "came faster than moefix reads" in heard.said[0]
