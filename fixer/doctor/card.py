"""Checks of the driver and the cards."""

from __future__ import annotations

from collections.abc import Iterator

from fixer.doctor.examine import Finding, Patient, State
from fixer.machine.cards import SHARED_MEMORY_BYTES
from fixer.machine.driver import occupancy, visible_cards

FREE_SHARE = 0.9
"""A card with less of its memory free is not only moefix's and SGLang's."""


def look_at_driver(patient: Patient) -> Iterator[Finding]:
    """The driver answers, and shows a card."""
    cards = visible_cards()
    if not cards:
        yield Finding(
            "driver",
            State.FAILURE,
            "no NVIDIA card is visible",
            "In Docker start with --gpus all and the NVIDIA Container Toolkit; else install the driver. "
            "CUDA_VISIBLE_DEVICES must not be empty.",
        )
    for card in cards:
        capability = "{}.{}".format(*card.capability)
        yield Finding(
            "driver",
            State.OK,
            f"device {card.index}: {card.name}, compute capability {capability}, {card.memory_mib} MiB,"
            f" driver {card.driver or 'of unknown version'}",
        )


def look_at_shared_memory(patient: Patient) -> Iterator[Finding]:
    """The driver's limit is the one that CUDA documents for the architecture."""
    for card in patient.cards:
        capability = "{}.{}".format(*card.capability)
        documented = SHARED_MEMORY_BYTES.get(card.capability)
        said = f"device {card.index}: {card.shared_memory} bytes a block"
        if documented is None:
            yield Finding(
                "shared memory",
                State.WARNING,
                f"{said}; compute capability {capability} is not in moefix's table",
                "Nothing to do: the driver's number counts. A newer moefix may know the card.",
            )
        elif documented != card.shared_memory:
            yield Finding(
                "shared memory",
                State.WARNING,
                f"{said}, and CUDA documents {documented} for {capability}",
                "Nothing to do here: the driver's number counts. Plans made elsewhere for this card may be off.",
            )
        else:
            yield Finding("shared memory", State.OK, f"{said}, as documented for {capability}")


def look_at_use(patient: Patient) -> Iterator[Finding]:
    """Nothing else uses the card."""
    for card in patient.cards:
        found = occupancy(card)
        who = f"device {card.index}"
        if found.free_mib is None:
            yield Finding("use of the card", State.OK, f"{who}: the driver does not say (a MIG slice, or no NVML)")
            continue
        state = f"{who}: {found.free_mib} of {card.memory_mib} MiB are free"
        state += f", {found.busy_percent} % busy" if found.busy_percent is not None else ""
        if found.is_busy or found.free_mib < FREE_SHARE * card.memory_mib:
            yield Finding(
                "use of the card",
                State.WARNING,
                f"{state}, held {found.held_by()}",
                "Stop what else uses it: SGLang takes most of the memory, and tuning beside another is less certain.",
            )
        else:
            yield Finding("use of the card", State.OK, state)
