"""How busy a card is and how much of its memory is free, as NVML says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Nvml:
    """NVML through nvidia-ml-py, where the driver has it: nvidia-smi's own numbers.

    Every failure means "not known", never a fault: containers, WSL and MIG slices leave out what they like.
    """

    def __init__(self) -> None:
        import pynvml  # 7,000 lines: only where a card is looked at

        self._nvml: Any = pynvml
        self._works = self._ask(lambda: pynvml.nvmlInit() or True) is not None

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(self._nvml.nvmlShutdown)

    def _ask(self, call: Callable[..., Any], *arguments: object) -> Any:
        """What NVML answers; None where it has no answer."""
        try:
            return call(*arguments)
        except (self._nvml.NVMLError, UnicodeDecodeError):
            return None

    def driver(self) -> str:
        """The driver's version, "" if not known."""
        return self._ask(self._nvml.nvmlSystemGetDriverVersion) or ""

    def memory_mib(self, pci_bus: str) -> int | None:
        """The card's memory as nvidia-smi shows it, in MiB; None if not known (GB10 and Jetson have no own memory)."""
        memory = self._memory(self._handle(pci_bus))
        return (memory.total >> 20 or None) if memory else None

    def occupancy(self, pci_bus: str) -> Occupancy:
        """What uses the card now."""
        handle = self._handle(pci_bus)
        if handle is None:
            return Occupancy()
        memory, rates = self._memory(handle), self._ask(self._nvml.nvmlDeviceGetUtilizationRates, handle)
        return Occupancy(
            free_mib=memory.free >> 20 if memory and memory.total else None,
            busy_percent=int(rates.gpu) if rates else None,
            holders=self._holders(handle),
        )

    def _handle(self, pci_bus: str) -> Any:
        return self._ask(self._nvml.nvmlDeviceGetHandleByPciBusId, pci_bus) if self._works else None

    def _memory(self, handle: Any) -> Any:
        return self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle) if handle is not None else None

    def _holders(self, handle: Any) -> tuple[Holder, ...]:
        """The processes that have memory on the card, the largest first; in a container the driver may hide them."""
        nvml, held = self._nvml, {}
        for call in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in self._ask(call, handle) or ():
                held[process.pid] = None if process.usedGpuMemory is None else process.usedGpuMemory >> 20
        holders = (Holder(pid, self._process_name(pid), mib) for pid, mib in held.items())
        return tuple(sorted(holders, key=lambda holder: (-(holder.mib or 0), holder.pid)))

    def _process_name(self, pid: int) -> str:
        """A process's program, "" if not known; its arguments may hold anything, a token among it, and stay out."""
        words = (self._ask(self._nvml.nvmlSystemGetProcessName, pid) or "").split() or [""]
        name = words[0].rpartition("/")[2]
        if not name:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
        return name[:60] if name.isprintable() else ""


BUSY_PERCENT = 10
"""From here on something else computes on the card: an idle one shows 0, a desktop a few percent."""


@dataclass(frozen=True)
class Holder:
    """A process that has memory on a card: its id, its program ("" if not known), MiB (None if not known)."""

    pid: int
    name: str
    mib: int | None

    def __str__(self) -> str:
        told = f"process {self.pid}" + (f" ({self.name})" if self.name else "")
        return told if self.mib is None else f"{told} with {self.mib} MiB"


@dataclass(frozen=True)
class Occupancy:
    """What uses a card now.

    Attributes:
        free_mib: memory that is free, in MiB; None if not known.
        busy_percent: share of the last sampling period (up to a second) in which kernels ran; None if not known.
        holders: processes with memory on it, the largest first; empty where the driver hides them (in a container).
    """

    free_mib: int | None = None
    busy_percent: int | None = None
    holders: tuple[Holder, ...] = ()

    @property
    def is_busy(self) -> bool:
        """Whether something computes on the card."""
        return self.busy_percent is not None and self.busy_percent >= BUSY_PERCENT

    def held_by(self, most: int = 4) -> str:
        """Who holds it, in words: the largest few."""
        if not self.holders:
            return "by what, the driver does not say here (nvidia-smi on the host does)"
        more = len(self.holders) - most
        return "by " + ", ".join(map(str, self.holders[:most])) + (f" and {more} more" if more > 0 else "")
