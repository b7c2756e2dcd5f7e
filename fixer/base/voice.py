"""How moefix speaks while it serves: one prefix, three levels, silence on request."""

from __future__ import annotations

from dataclasses import dataclass

from fixer.base.progress import Progress, tell
from fixer.base.status_board import Board, OnBoard


@dataclass(frozen=True)
class Voice:
    """What moefix says on standard error; `quiet` leaves only warnings."""

    quiet: bool = False
    board: Board | None = None

    def line(self, text: str) -> None:
        """Something that is good to know."""
        if not self.quiet:
            self.warning(text)

    def warning(self, text: str) -> None:
        """Something that must be known."""
        tell(text)

    def follow(self, progress: Progress) -> Progress:
        """Have the board show a piece of work's progress too."""
        return progress if self.board is None else OnBoard(progress, self.board)
