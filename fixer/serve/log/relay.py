"""Passes SGLang's output on, byte for byte, and lets another process read along.

SGLang is the main process and writes into pipes. The relay, a small process in a session of its own, reads them and
writes every byte to where moefix's output went before. It passes bytes first; then it offers them to a second process,
the reader (`fixer.serve.log.read_log`), through a socket that never blocks and holds about 200 KB. The promises:

- Every byte arrives, unchanged and in order, until the last one before the end of the server; half lines too.
- Reading along cannot hurt that. What the reader has no time for is dropped for the reader and never for the output. A
  reader that raises, hangs for 10 s, or needs more than 32 MiB more is ended; one line says so, and the bytes go on.
- SGLang keeps its process id, its exit code and its signals; signals to its whole group leave the relay alone.
- A reader of the output that is slow makes the server wait, as without a relay. One that is gone does not: what would
  have gone there is dropped. One output does not wait for the other. A full disk loses what does not fit, no more.
- Memory is bounded: 64 KiB for each output here, 32 MiB in the reader.

Nothing stands in for the relay: if somebody kills it, SGLang gets EPIPE, as behind any `| tee`. In Docker SGLang is
process 1, whose end kills the relay: there a line counts once it is forwarded, which takes microseconds.

Measured on two cores with the output in a pipe: 1.2 GB/s of lines of 160 bytes, "Error" or "MoE" in each or not. About
12 MB here and 14 MB in the reader, of which they share most. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

from fixer.serve.log.settings import Settings
from fixer.serve.log.stream import PIECE, Stream

PATIENCE = 0.3
"""Seconds that moefix's own words wait for the server to end its line."""


BEHIND_SECONDS = 0.1
"""A reader that is behind is offered nothing for so long: a flood must not have it take a processor from the server."""

STUCK_SECONDS = 30.0
"""A reader that takes nothing for so long, though there is something all the time, is ended."""

END_SECONDS = 5.0
"""How long the reader may take for its last words after the server's end."""

OFF = "moefix: reading along in SGLang's log has stopped ({}): the log goes on unchanged, without moefix's words\n"

# A message to the reader begins with one byte: the output's number, and whether something before it was dropped.
STREAM, GAP = 0x0F, 0x80

# A message from the reader begins with one byte.
SAY, FAULT, DONE = b"+", b"!", b"."

_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGTSTP", "SIGTTOU", "SIGTTIN", "SIGUSR1", "SIGUSR2")


def main(words: list[str]) -> None:
    """Be the relay: `SIGN SOURCE:TARGET ...` are descriptors; the settings come on standard input."""
    sign = int(words[0])
    ends = [word.split(":") for word in words[1:]]
    streams = [Stream(int(source), int(target)) for source, target in ends]
    settings = sys.stdin.buffer.read().decode()
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.chdir("/")
    _lead_nowhere(0)
    if os.fork():
        os._exit(0)  # so that the relay is no child of the server, unless that is process 1
    with contextlib.suppress(BaseException):  # nothing may come out here that is not the server's
        child, link = _start_reader(settings, streams, sign)
        os.write(sign, b"r")
        os.close(sign)
        Relay(streams, child, link).run()
    os._exit(0)


def _lead_nowhere(*descriptors: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _start_reader(settings: str, streams: list[Stream], sign: int) -> tuple[int, socket.socket | None]:
    """Fork the process that reads along: its id and a socket to it, (0, None) where none can be had."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
    except OSError:
        return 0, None
    if child:
        theirs.close()
        ours.setblocking(False)
        return child, ours
    try:
        ours.close()
        # It holds neither end of the server's output: with the relay gone, SGLang must get EPIPE and not block for
        # good, and who reads the output must see its end.
        for stream in streams:
            os.close(stream.source)
        os.close(sign)
        _lead_nowhere(1, 2)
        from fixer.serve.log.read_log import read_along

        read_along(Settings.from_json(settings), theirs)
    except BaseException as fault:
        with contextlib.suppress(BaseException):
            theirs.send(FAULT + f"{type(fault).__name__}: {fault}"[:300].encode("utf-8", "replace"))
    os._exit(0)


class Relay:
    """Passes bytes on, a thread for each output, and says what the reader wants said.

    Args:
        streams: the server's outputs; moefix's words go to the last one.
        child, link: the reader's process id and a non-blocking socket to it; None for none.
    """

    def __init__(self, streams: list[Stream], child: int, link: socket.socket | None) -> None:
        self._streams = streams
        self._errors = streams[-1]
        self._child, self._link = child, link
        self._dropped = [False] * len(streams)
        self._rest_until = 0.0
        self._stuck: float | None = None
        """Since when the reader has taken nothing."""
        self._hung = False
        self._words = b""
        self._words_since = 0.0

    def run(self) -> None:
        """Work until the server's output ends and the reader has said its last words."""
        others = [threading.Thread(target=self._pump, args=(number,)) for number in range(len(self._streams) - 1)]
        for thread in others:
            thread.start()
        ended = False
        while not ended or any(thread.is_alive() for thread in others):
            sources = [] if ended else [self._errors.source]
            ready = self._wait(sources, 0.1 if ended else None)
            if self._errors.source in ready:
                ended = not self._pass_on(len(self._streams) - 1)
            self._hear(ready)
        self._finish()

    def _pump(self, number: int) -> None:
        try:
            while self._pass_on(number):
                pass
        except BaseException:
            os._exit(1)  # a broken pipe is better for the server than one that nobody reads

    def _pass_on(self, number: int) -> bool:
        """Pass on what is there; False at the end."""
        stream = self._streams[number]
        data = stream.read()
        stream.put(data)
        if data:
            self._offer(number, data)
        return bool(data)

    def _wait(self, sources: list[int], seconds: float | None) -> set[int]:
        """The descriptors at which something came: the sources, the reader."""
        if self._words:
            rest = max(0.0, self._words_since + PATIENCE - time.monotonic())
            seconds = rest if seconds is None else min(seconds, rest)
        poll = select.poll()
        for descriptor in [*sources, *([self._link.fileno()] if self._link else [])]:
            poll.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000 + 1)}

    # --- the reader ---

    def _offer(self, number: int, data: memoryview) -> None:
        """Let the reader have what went out, unless it is behind."""
        link, now = self._link, time.monotonic()
        if link is None or now < self._rest_until:
            self._dropped[number] = True
            return
        try:
            link.sendmsg([bytes([number | (GAP if self._dropped[number] else 0)]), data])
            self._dropped[number] = False
            self._stuck = None
        except OSError:  # it is behind, or gone, which is noticed where it is heard
            self._dropped[number] = True
            self._rest_until = now + BEHIND_SECONDS
            self._stuck = self._stuck or now
            if now - self._stuck > STUCK_SECONDS and not self._hung:
                self._hung = True
                link.shutdown(socket.SHUT_RDWR)  # heard as its end

    def _hear(self, ready: set[int]) -> None:
        """Take what the reader wants said, and say what is due."""
        if self._link is not None and self._link.fileno() in ready:
            try:
                message = self._link.recv(PIECE)
            except (BlockingIOError, ConnectionResetError):  # it left something unread: what it sent comes next
                message = SAY
            except OSError:
                message = b""
            if message[:1] == SAY:
                self._queue(message[1:])
            else:
                self._link = None
                if message[:1] != DONE:
                    why = message[1:].decode("utf-8", "replace") or self._why_gone()
                    self._queue(OFF.format("".join(c if c.isprintable() else "?" for c in why)).encode())
        self._speak()

    def _why_gone(self) -> str:
        """Why the reader closed its end without a word."""
        if self._hung:
            self._end_reader()
            return "it took nothing any more"
        with contextlib.suppress(OSError):
            _, status = os.waitpid(self._child, 0)
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            return "it hung" if number == signal.SIGALRM else f"ended by signal {number}" if number else "it ended"
        return "it ended"

    def _end_reader(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self._child, signal.SIGKILL)

    # --- moefix's own words ---

    def _queue(self, words: bytes) -> None:
        if words and not self._words:
            self._words_since = time.monotonic()
        self._words += words

    def _speak(self, *, now: bool = False) -> None:
        """Put what is to be said between two lines of the server; where it does not end its line, into it."""
        if not self._words:
            return
        if self._errors.line_open and not now and time.monotonic() < self._words_since + PATIENCE:
            return
        words, self._words = self._words, b""
        self._errors.put((b"\n" if self._errors.line_open else b"") + words)

    def _finish(self) -> None:
        """Have the reader say its last words; it keeps what it learnt after that, by itself."""
        end = time.monotonic() + END_SECONDS
        if self._link is not None:
            with contextlib.suppress(OSError):
                if any(self._dropped):  # nothing more comes that could say so
                    self._link.settimeout(END_SECONDS)
                    self._link.send(bytes([GAP]))
                    self._link.setblocking(False)
                self._link.shutdown(socket.SHUT_WR)
        while self._link is not None and (rest := end - time.monotonic()) > 0:
            self._hear(self._wait([], rest))
        if self._link is not None:
            self._end_reader()
        self._speak(now=True)
