"""The card: SGLang's name for it, architecture, opt-in shared memory, memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One kind of card, from the table or read from the driver.

    Attributes:
        name: as the CUDA driver writes it ("NVIDIA GeForce RTX 4090").
        capability: compute capability, (major, minor).
        shared_memory: opt-in shared memory per block, in bytes.
        memory_mib: the card's memory as nvidia-smi reports it, in MiB.
        index: position among the visible devices; None for a card of the table.
        driver: the driver's version ("580.159.03"), "" for a card of the table.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    memory_mib: int
    index: int | None = None
    driver: str = ""

    @property
    def sglang_name(self) -> str:
        """The `device_name=` part of SGLang's file names: every blank becomes an underscore, nothing else changes."""
        return self.name.replace(" ", "_")

    @property
    def arch(self) -> int:
        """The architecture as Triton counts it: 89 for compute capability 8.9."""
        return self.capability[0] * 10 + self.capability[1]
