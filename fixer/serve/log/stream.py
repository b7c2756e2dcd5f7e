"""A stream of bytes cut into lines of bounded length."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections import deque
from dataclasses import dataclass, field

from fixer.serve.log import diagnose

PIECE = 1 << 16
"""Most bytes of one read."""


LINE_CAP = 1 << 16
"""Of a longer line only the end is looked at, in bytes. SGLang's longest, its arguments, has some 12 KiB."""


@dataclass
class Stream:
    """One of the server's outputs: where it comes in, where it goes, and what is held of it."""

    source: int
    target: int
    pending: bytes = b""
    carry: bytes = b""
    """The begun line, for reading along."""
    line_open: bool = False
    """The last byte that went out did not end a line."""
    ended: bool = False
    gone: bool = False
    """Nobody reads the output any more."""
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=diagnose.FRAMES))

    def __post_init__(self) -> None:
        mode = os.fstat(self.target).st_mode
        # What poll calls writable takes so much of a pipe without blocking; a file takes anything.
        self._step = PIECE if stat.S_ISREG(mode) else select.PIPE_BUF
        self._poll = select.poll()
        self._poll.register(self.target, select.POLLOUT)

    def read(self) -> bytes:
        """What is there, b"" at the end."""
        data = os.read(self.source, PIECE)
        self.ended = not data
        return data

    def put(self, data: bytes) -> None:
        """Have `data` go out, as far as it can without waiting."""
        self.pending = self.pending + data if self.pending else data
        if data:
            self.line_open = not data.endswith(b"\n")
        self.push()

    def push(self) -> None:
        """Write as much as can be written without waiting."""
        view, done = memoryview(self.pending), 0
        while done < len(view) and not self.gone:
            if not self._poll.poll(0):
                break
            try:
                done += os.write(self.target, view[done : done + self._step])
            except BlockingIOError:
                break
            except OSError as fault:
                # A full disk may have room again; a broken pipe, a terminal hung up or a closed socket will not.
                self.gone = fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                done = len(view)
        self.pending = b"" if self.gone else bytes(view[done:])

    def lines(self, data: bytes) -> list[bytes]:
        """The lines that `data` ends."""
        text = self.carry + data
        end = text.rfind(b"\n") + 1
        self.carry = text[end:][-LINE_CAP:]
        return text[: end - 1].split(b"\n") if end else []
