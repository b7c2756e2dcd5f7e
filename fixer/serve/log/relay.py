"""Passes SGLang's output on, byte for byte, and reads along: the verdict about MoE files, errors explained.

SGLang is the main process and writes into pipes; this small process, in a session of its own, reads them and writes
what it read to where moefix's output went before. It forwards first and reads along afterwards, and ends when the
pipes do, after the last byte.

It must never hurt the server, so it runs as a pair. The active process works; its standby, a fork, holds the pipes'
read ends too and waits for the active one's death, upon which it takes over and forks a standby of its own. So a
killed relay loses at most what it had in hand, and the server neither blocks nor sees a broken pipe. If both are
killed at one instant, the server's prints fail with EPIPE, as they would without a relay if its reader went away.
(The server itself must not hold a read end: with nobody reading, the pipe would fill and block it for good.)

A reader of the output that is slow makes the server wait, as without a relay; one that is gone does not: what would
have gone there is dropped. In Docker SGLang is process 1, whose end kills the relay: there a line counts once it is
forwarded, which takes microseconds.

Standard library only, about 14 MB, of which the standby shares nearly all.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fixer.serve.log import diagnose
from fixer.serve.log.diagnose import Diagnosis, Explanation
from fixer.serve.log.settings import Settings
from fixer.serve.log.stream import LINE_CAP, PIECE, Stream
from fixer.serve.log.verdict import HARMLESS, PASSING, Watch
from fixer.sglang import log_lines as sglang_log
from fixer.sglang.log_lines import LogLine, Said

FRAME_CAP = 1000
"""Bytes that are kept of a line for the frames above an error."""

FLOOD_SECONDS = 0.25
"""After so long without a pause the log is not read along until there is one: tens of MB, no log of SGLang's."""

PATIENCE = 0.3
"""Seconds that moefix's own words wait for the server to end its line."""


_MARKERS = (*sglang_log.MARKERS, *diagnose.MARKERS)
_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGTSTP", "SIGTTOU", "SIGTTIN", "SIGUSR1", "SIGUSR2")


# --- the pair --------------------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    """Start the pair: `SIGN SOURCE:TARGET ...` are descriptors; the settings come on standard input."""
    sign = int(words[0])
    ends = [word.split(":") for word in words[1:]]
    streams = [Stream(int(source), int(target)) for source, target in ends]
    settings = Settings.from_json(sys.stdin.buffer.read().decode())
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    if os.fork():
        os._exit(0)  # so that the pair is no child of the server, unless that is process 1
    with contextlib.suppress(BaseException):  # nothing may come out here that is not the server's
        Relay(streams, settings).run(sign)
    os._exit(0)


class Relay:
    """Both of the pair: the active one from the start, the standby from its promotion on."""

    def __init__(self, streams: list[Stream], settings: Settings) -> None:
        self._streams = streams
        self._errors = streams[-1]
        self._settings = settings
        self._watch = Watch(settings.expected)
        self._diagnosis = Diagnosis()
        self._markers = _MARKERS + (sglang_log.SERVED_MARKERS if settings.expected.lazy else ())
        self._peer: socket.socket | None = None
        self._retry = 0.0
        self._words: list[str] = []
        self._words_since = 0.0
        self._notes: list[dict[str, Any]] = []
        self._clerk = 0
        self._paused = time.monotonic()

    def run(self, sign: int) -> None:
        """Work until the server's output ends."""
        self._have_standby()
        with contextlib.suppress(OSError):
            os.write(sign, b"r")
        os.close(sign)
        self._news()
        while self._open():
            self._step()
        self._finish()

    def _open(self) -> bool:
        return any(not stream.ended or stream.pending for stream in self._streams)

    # --- the two ---

    def _have_standby(self) -> None:
        """Fork a standby. In the standby this returns once it has been promoted and has a standby itself."""
        while True:
            mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                child = os.fork()
            except OSError:
                mine.close()
                other.close()
                self._retry = time.monotonic() + 1
                return
            if child:
                other.close()
                mine.setblocking(False)
                self._peer = mine
                return
            mine.close()
            if self._peer is not None:
                self._peer.close()
                self._peer = None
            self._wait_for_promotion(other)

    def _wait_for_promotion(self, other: socket.socket) -> None:
        """Follow what the active one has said, until it dies; end with it where it ends by itself."""
        for stream in self._streams:
            stream.pending, stream.carry = b"", b""  # what was in the active one's hand stays its own
            stream.line_open = True
        self._words, self._notes, self._clerk = [], [], 0
        while True:
            try:
                message = other.recv(PIECE)
            except OSError:
                message = b""
            if not message:
                other.close()
                return
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._follow(json.loads(message))

    def _follow(self, message: Mapping[str, Any]) -> None:
        if "end" in message:
            os._exit(0)
        if "line" in message:
            row = message["line"]
            facts = tuple((name, value) for name, value in row["facts"])
            self._watch.see(LogLine(Said[row["said"]], row["wanted"], row["used"], facts), time.monotonic())
        if "verdict" in message:
            self._watch.news(float("inf"))
        if "fault" in message:
            self._diagnosis.skip(tuple(message["fault"]))

    def _tell(self, **message: Any) -> None:
        if self._peer is not None:
            with contextlib.suppress(OSError):
                self._peer.send(json.dumps(message).encode())

    # --- one round ---

    def _step(self) -> None:
        poll = select.poll()
        waiting: dict[int, Callable[[], None]] = {}

        def wait(descriptor: int, event: int, act: Callable[[], None]) -> None:
            poll.register(descriptor, event)
            waiting[descriptor] = act

        for stream in self._streams:
            if stream.pending:
                wait(stream.target, select.POLLOUT, stream.push)
            elif not stream.ended:
                wait(stream.source, select.POLLIN, lambda stream=stream: self._pass_on(stream))  # type: ignore[misc]
        if self._peer is not None:
            wait(self._peer.fileno(), select.POLLIN, self._lost_standby)
        elif time.monotonic() >= self._retry:
            self._have_standby()
        there = poll.poll(0)
        if not there:
            there = poll.poll(self._timeout())
            self._paused = time.monotonic()
        for descriptor, _ in there:
            waiting[descriptor]()
        self._news()
        self._speak()
        self._write_down()

    def _timeout(self) -> float | None:
        """Milliseconds to the next thing that is due without any output."""
        due = [time_due for time_due in (self._watch.wakes_at,) if time_due is not None]
        if self._words and not self._errors.pending:
            due.append(self._words_since + PATIENCE)
        if self._peer is None:
            due.append(self._retry)
        if self._notes:
            due.append(time.monotonic() + 0.02)
        return max(0.0, (min(due) - time.monotonic()) * 1000 + 1) if due else None

    def _lost_standby(self) -> None:
        assert self._peer is not None
        self._peer.close()
        self._peer = None
        self._retry = time.monotonic() + 0.05  # not as fast as something may kill them
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _pass_on(self, stream: Stream) -> None:
        data = stream.read()
        stream.put(data)
        if time.monotonic() - self._paused > FLOOD_SECONDS:
            stream.carry = b""
            return
        self._read_along(stream, stream.lines(data) if data else [stream.carry])

    # --- reading along ---

    def _read_along(self, stream: Stream, lines: list[bytes]) -> None:
        whole = b"\n".join(lines)
        if not any(marker in whole for marker in self._markers):
            stream.recent.extend(line[:FRAME_CAP] for line in lines[-diagnose.FRAMES :])
            return
        for line in lines:
            if any(marker in line for marker in self._markers):
                self._look_at(line[-LINE_CAP:].decode("utf-8", "replace"), stream.recent)
            stream.recent.append(line[:FRAME_CAP])

    def _look_at(self, line: str, above: Iterable[bytes]) -> None:
        said = sglang_log.read_line(line)
        if said is not None:
            before = self._watch.seen
            self._watch.see(said, time.monotonic())
            if self._watch.seen != before:
                row = {"said": said.said.name, "wanted": said.wanted, "used": said.used, "facts": said.facts}
                self._tell(line=row)
                if said.said is Said.READY:
                    self._notes.append({"detail": "SGLang is ready"})
        frames = (frame.decode("utf-8", "replace") for frame in reversed(tuple(above)))
        finding = self._diagnosis.see(line, frames)
        if finding is not None:
            self._explain(finding)

    def _explain(self, finding: Explanation) -> None:
        self._tell(fault=Diagnosis.kind(finding))
        installed = bool(self._settings.expected.pairs)
        for text in finding.explain(self._settings.card, installed=installed):
            self._say(_printable(text))

    def _news(self) -> None:
        """Say a verdict that is due."""
        verdict = self._watch.news(time.monotonic())
        if verdict is None:
            return
        self._tell(verdict=verdict.outcome.name)
        text = _printable(verdict.text)
        if not (self._settings.quiet and verdict.outcome in HARMLESS):
            self._say(text)
        self._notes.append({"verdict": text})
        if verdict.asked is not None and verdict.outcome not in PASSING:
            self._notes.append({"asked": verdict.asked})

    # --- moefix's own words ---

    def _say(self, text: str) -> None:
        if not self._words:
            self._words_since = time.monotonic()
        self._words.append(f"moefix: {text}\n")

    def _speak(self, *, now: bool = False) -> None:
        """Put what is to be said between two lines of the server; where it does not end its line, into it."""
        if not self._words or self._errors.pending:
            return
        late = now or time.monotonic() >= self._words_since + PATIENCE
        if self._errors.line_open and not late:
            return
        begin = "\n" if self._errors.line_open else ""
        words, self._words = self._words, []
        self._errors.put((begin + "".join(words)).encode())

    def _finish(self) -> None:
        self._watch.end()
        self._news()
        self._speak(now=True)
        end = time.monotonic() + 1
        while self._errors.pending and time.monotonic() < end:
            time.sleep(0.01)
            self._errors.push()
        self._tell(end=True)
        self._notes.append({"ended": True})
        end = time.monotonic() + 5
        while self._notes and time.monotonic() < end:
            self._write_down()
            time.sleep(0.005)

    # --- files, by a process of their own: a slow disk must not hold up the server's output ---

    def _write_down(self) -> None:
        """Have a clerk keep what was learnt, one at a time, so that none overtakes another."""
        if not self._notes:
            return
        if self._clerk:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._clerk, os.WNOHANG)[0] == 0:
                    return
        self._clerk = 0
        notes, self._notes = self._notes, []
        with contextlib.suppress(OSError):
            self._clerk = os.fork()
            if self._clerk:
                return
            with contextlib.suppress(BaseException):
                self._let_go()
                for note in notes:
                    _keep(self._settings, note)
            os._exit(0)

    def _let_go(self) -> None:
        """In a child that only writes files: hold nothing that would keep others from seeing an end."""
        for stream in self._streams:
            os.close(stream.source)
        for target in (1, 2):
            os.close(target)
        if self._peer is not None:
            self._peer.close()


def _printable(text: str) -> str:
    """What the log says of paths, on one line, of bearable length, and harmless to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:2000])


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
