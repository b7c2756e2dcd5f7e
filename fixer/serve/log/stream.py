"""A stream of bytes cut into lines of bounded length."""

from __future__ import annotations

import errno
import os
import select

PIECE = 1 << 16
"""Most bytes of one read."""


class Stream:
    """One of the server's outputs: the descriptor it comes in by, and the one it goes out by."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.line_open = False
        """The last byte that went out did not end a line."""
        self.gone = False
        """Nobody reads the output any more."""
        self._room = bytearray(PIECE)
        self._view = memoryview(self._room)

    def read(self) -> memoryview:
        """What is there, at most `PIECE` bytes, valid until the next call; empty at the end."""
        return self._view[: os.readv(self.source, [self._room])]

    def put(self, data: memoryview | bytes) -> None:
        """Write all of `data`, and wait for whoever reads the output if need be."""
        if data:
            self.line_open = data[-1] != 0x0A
        view = memoryview(data)
        while view and not self.gone:
            try:
                view = view[os.write(self.target, view) :]
            except BlockingIOError:  # whoever made the output had it not block
                select.select([], [self.target], [])
            except OSError as fault:
                # A full disk may have room again; a broken pipe, a terminal hung up or a closed socket will not.
                self.gone = fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                return
