"""One tuning at a time on a kind of card, and whether the cards are free."""

from __future__ import annotations

import time
from pathlib import Path

from fixer.base.data_folder import DataFolder
from fixer.base.errors import CardError
from fixer.base.files import safe_name
from fixer.base.locks import Lock
from fixer.base.progress import Progress
from fixer.families.fused_moe.arguments import Product
from fixer.machine.cards import Card
from fixer.machine.driver import occupancy
from fixer.tuning.job import Job
from fixer.tuning.measure.memory import LARGEST_L2, SMALLEST_L2, full_rotation, needed_bytes, rotations, with_spare
from fixer.workload import BOTH

SECOND_LOOK_SECONDS = 1.5
"""The driver's load is that of up to a second before."""


def turn(home: Path, card: Card, progress: Progress) -> Lock:
    """The right to tune on a kind of card, among all that share the data folder; for use in a `with` statement.

    Whoever had to wait finds the other's result in the data folder: it is kept before the turn ends.
    """
    lock = DataFolder(home).locks / f"{safe_name(card.sglang_name)}.lock"
    is_said = False

    def say_who(seconds: float, holder: str) -> None:
        nonlocal is_said
        if not is_said:
            progress.note(f"another moefix is tuning on this volume ({holder}); waiting for it")
        is_said = True

    return Lock(lock, waiting=say_who, waited=lambda: progress.note("the other moefix is done; going on"))


def state_of_cards(job: Job) -> tuple[str, ...]:
    """What else uses the cards, one line for each that is not free for measuring.

    Raises:
        CardError: so little memory is free that no layout of the weights fits (`tuning.room`).
    """
    lines: list[str] = []
    for card in job.cards:
        found = occupancy(card)
        if found.is_busy:  # perhaps with the end of what another moefix did
            time.sleep(SECOND_LOOK_SECONDS)
            found = occupancy(card)
        who = f"{card.name} (device {card.index or 0})"
        if found.is_busy:
            lines.append(
                f"{who} is {found.busy_percent} % busy, held {found.held_by()}: its times will be less certain"
            )
        if found.free_mib is None:
            continue
        free, products = found.free_mib << 20, {p: Product(job.workload, p, job.rows[-1]) for p in BOTH}
        state = f"{found.free_mib} of {card.memory_mib} MiB are free on {who}, which is held {found.held_by()}"
        if rotations(products, SMALLEST_L2, free) is None:
            raise CardError(f"Too little to tune: {state}.", "Stop what else uses the card, and try again.")
        if (
            with_spare(sum(needed_bytes(product, full_rotation(product, LARGEST_L2)) for product in products.values()))
            > free
        ):
            lines.append(f"{state}: tuning takes smaller weights")
    return tuple(lines)
