"""Reads along in SGLang's log: the verdict about its MoE files, and errors explained.

A process of its own beside the relay (`fixer.serve.log.relay`), which offers it what went out and drops what it has
no time for. Whatever goes wrong here ends this process and nothing else: an exception is handed to the relay, a step
of more than `STEP_SECONDS` is ended by the kernel (SIGALRM), and memory has a limit.

Only lines that begin with SGLang's own prefix count for the verdict (`sglang_log.own_message`). What remains possible:
who gets raw line ends into SGLang's log, by a parser that logs the model's output, and writes the prefix too, can have
a false verdict said while there is no final one (before the server is ready; later only with neither CUDA graphs nor
warm-up, or with --log-level warning), and a file's name kept only if it can be a file of this very model in a folder
where this SGLang looks. An explanation of an error can be provoked at any time: it is words in the log and no more.
"""

from __future__ import annotations

import contextlib
import queue
import re
import resource
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fixer.serve.log import diagnose, signs
from fixer.serve.log.diagnose import Diagnosis, Explanation
from fixer.serve.log.relay import DONE, GAP, SAY, STREAM
from fixer.serve.log.settings import Settings
from fixer.serve.log.stream import PIECE
from fixer.serve.log.verdict import HARMLESS, PASSING, Watch
from fixer.sglang import log_lines as sglang_log
from fixer.sglang.log_lines import Said

LINE_CAP = 1 << 16
"""A longer line is not looked at, in bytes. SGLang's longest, its arguments, has some 12 KiB."""

HISTORY = 1 << 18
"""Bytes before a line that are kept for the frames above an error."""

FRAME_CAP = 1000
"""Bytes that are looked at of a line above an error."""

STEP_SECONDS = 10
"""One message takes milliseconds. What takes so long hangs."""

MEMORY = 32 << 20
"""Bytes that this process may need beyond what it has at its start."""

KEEP_SECONDS = 5.0
"""How long the last notes may take after the server's end: a slow disk."""


def read_along(settings: Settings, link: socket.socket) -> None:
    """Read what the relay offers until it ends, and have it say what is due.

    Raises:
        BaseException: whatever goes wrong; the caller tells the relay.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(STEP_SECONDS)
    _limit()
    notes = Notes(settings)

    def say(text: str) -> None:
        with contextlib.suppress(BlockingIOError):
            link.send(SAY + f"moefix: {text}\n".encode("utf-8", "replace"), socket.MSG_DONTWAIT)

    reader = Reader(settings, say, notes.add)
    poll = select.poll()
    poll.register(link, select.POLLIN)
    while True:
        due = reader.wakes_at
        signal.alarm(0)
        ready = poll.poll(None if due is None else max(0.0, (due - time.monotonic()) * 1000 + 1))
        signal.alarm(STEP_SECONDS)
        if ready:
            message = link.recv(PIECE + 1)
            if not message:
                break
            reader.take(message[0] & STREAM, message[1:], gap=bool(message[0] & GAP))
        reader.news()
    reader.end()
    link.send(DONE)
    link.close()
    notes.end()


def _limit() -> None:
    """Have the kernel refuse more memory than this process may need."""
    threading.stack_size(1 << 19)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))


class Lines:
    """Cuts one output into lines, and gives those with a marker.

    Args:
        markers: what a line must contain to be looked at.
    """

    def __init__(self, markers: re.Pattern[bytes]) -> None:
        self._markers = markers
        self._carry = b""
        self._skips = False
        """The begun line is not looked at: its beginning was dropped, or it is too long."""
        self._blocks: deque[bytes] = deque()
        self._kept = 0

    def take(self, data: bytes, *, gap: bool = False) -> Iterator[tuple[bytes, Iterator[bytes]]]:
        """The lines with a marker that `data` ends, each with the lines above it, the nearest first."""
        if gap:
            self._carry, self._skips = b"", True
        end = data.rfind(b"\n") + 1
        if not end:
            self._begin(self._carry + data)
            return
        whole = self._carry + data[:end]
        start = whole.find(b"\n") + 1 if self._skips else 0
        self._skips = False
        self._begin(data[end:])
        while match := self._markers.search(whole, start):
            begin, stop = whole.rfind(b"\n", 0, match.start()) + 1, whole.find(b"\n", match.start())
            if stop - begin <= LINE_CAP:
                yield whole[begin:stop], self._above(whole[:begin])
            start = stop + 1
        self._remember(whole)

    def last(self) -> Iterator[tuple[bytes, Iterator[bytes]]]:
        """The line that was never ended, if it has a marker."""
        return self.take(b"\n")

    def _begin(self, carry: bytes) -> None:
        self._skips = self._skips or len(carry) > LINE_CAP
        self._carry = b"" if self._skips else carry

    def _above(self, block: bytes) -> Iterator[bytes]:
        blocks = (block, *reversed(self._blocks))
        lines = (line[:FRAME_CAP] for each in blocks for line in reversed(each[-HISTORY:].splitlines()))
        return islice(lines, diagnose.FRAMES)

    def _remember(self, block: bytes) -> None:
        self._blocks.append(block[-HISTORY:])
        self._kept += len(self._blocks[-1])
        while self._kept > HISTORY and len(self._blocks) > 1:
            self._kept -= len(self._blocks.popleft())


class Reader:
    """Understands the lines of a server's outputs.

    Args:
        settings: what moefix did and wants.
        say: has one line said in the log.
        keep: has one thing that was learnt kept in the data folder.
    """

    def __init__(
        self, settings: Settings, say: Callable[[str], None], keep: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._settings, self._say, self._keep = settings, say, keep
        self._watch = Watch(settings.expected)
        self._diagnosis = Diagnosis()
        self._patterns = sglang_log.patterns_for((Said[name], words) for name, words in settings.expected.wordings)
        served = sglang_log.SERVED_MARKERS if settings.expected.lazy else ()
        markers = (*sglang_log.MARKERS, *signs.MARKERS, *served)
        self._markers = re.compile(b"|".join(map(re.escape, markers)))
        self._outputs: dict[int, Lines] = {}

    @property
    def wakes_at(self) -> float | None:
        """The time, on the monotonic clock, at which `news` must be called although no line came."""
        return min((due for due in (self._watch.wakes_at, self._diagnosis.wakes_at) if due is not None), default=None)

    def take(self, output: int, data: bytes, *, gap: bool) -> None:
        """Take in what one output wrote.

        Args:
            output: its number.
            gap: something before it was dropped.
        """
        if gap:
            self._watch.lose()
        lines = self._outputs.setdefault(output, Lines(self._markers))
        for line, above in lines.take(data, gap=gap):
            self._see(line, above)

    def news(self) -> None:
        """Say what is due by now."""
        now = time.monotonic()
        self._explain(self._diagnosis.news(now))
        verdict = self._watch.news(now)
        if verdict is None:
            return
        text = _printable(verdict.text)
        if not (self._settings.quiet and verdict.outcome in HARMLESS):
            self._say(text)
        self._keep({"verdict": text})
        if verdict.asked is not None and verdict.outcome not in PASSING:
            self._keep({"asked": verdict.asked})

    def end(self) -> None:
        """The log has ended: say what is left."""
        for lines in self._outputs.values():
            for line, above in lines.last():
                self._see(line, above)
        self._explain(self._diagnosis.news())
        self._watch.end()
        self.news()

    def _see(self, line: bytes, above: Iterator[bytes]) -> None:
        text, now = line.decode("utf-8", "replace"), time.monotonic()
        message = sglang_log.own_message(text)
        if message is not None:
            said = sglang_log.read_line(message, self._patterns)
            if said is not None:
                ready = self._watch.seen.ready
                self._watch.see(said, now)
                if self._watch.seen.ready and not ready:
                    self._keep({"detail": "SGLang is ready"})
                self.news()
                return
            if sglang_log.is_request(message):
                return
        frames = (frame.decode("utf-8", "replace") for frame in above)
        self._explain(self._diagnosis.see(text, frames, now))

    def _explain(self, finding: Explanation | None) -> None:
        if finding is not None:
            for text in finding.explain(self._settings.card, installed=bool(self._settings.expected.pairs)):
                self._say(_printable(text))


def _printable(text: str) -> str:
    """What the log says of paths, on one line, of bearable length, and harmless to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:2000])


# --- files -----------------------------------------------------------------------------------------------------------


class Notes:
    """Keeps what was learnt in the data folder, in a thread, since a slow disk must not hold up reading."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._begun = False

    def add(self, note: Mapping[str, Any]) -> None:
        """Keep one thing, after those before it."""
        if not self._begun:
            self._thread.start()
            self._begun = True
        self._queue.put(note)

    def end(self) -> None:
        """Keep that the server has ended, and wait for all that is being kept."""
        self.add({"ended": True})
        self._queue.put(None)
        self._thread.join(KEEP_SECONDS)

    def _work(self) -> None:
        for note in iter(self._queue.get, None):
            with contextlib.suppress(Exception):
                _keep(self._settings, note)


def _keep(settings: Settings, note: Mapping[str, Any]) -> None:
    """Keep one thing that was learnt in the data folder."""
    from fixer.base.status import Phase
    from fixer.base.status_board import resume_board
    from fixer.serve.asked import keep_name

    if "asked" in note:
        if settings.record:
            keep_name(Path(settings.record), settings.question, *note["asked"])
        return
    board = resume_board(Path(settings.state)) if settings.state else None
    if board is not None:
        board.update(**({"phase": Phase.ENDED, "detail": ""} if "ended" in note else note))
