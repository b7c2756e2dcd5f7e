"""How busy a card is and how much of its memory is free, as NVML says."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

_NVML_LIBRARY = "libnvidia-ml.so.1"


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t: three counts of bytes (nvml.h)."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _NvmlProcess(ctypes.Structure):
    """nvmlProcessInfo_t of version 2 and 3: process id, bytes, two MIG ids (nvml.h)."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _NvmlUtilization(ctypes.Structure):
    """nvmlUtilization_t: percent of the last sampling period in which kernels ran, memory was moved (nvml.h)."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


_NVML_PROCESS_LISTS = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3")


_NVML_UNKNOWN_BYTES = (1 << 64) - 1
"""NVML_VALUE_NOT_AVAILABLE as an unsigned number: the driver does not say (Windows under WSL, some containers)."""


_MOST_HOLDERS = 256


class Nvml:
    """libnvidia-ml, where it is there: nvidia-smi's own numbers. Every failure means "not known", never a fault."""

    def __init__(self) -> None:
        self._library = load(_NVML_LIBRARY)
        if self._library is not None and not self._works("nvmlInit_v2"):
            self._library = None

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        self._works("nvmlShutdown")

    def _works(self, function: str, *arguments: object) -> bool:
        call = getattr(self._library, function, None)
        return call is not None and call(*arguments) == 0

    def driver(self) -> str:
        """The driver's version, "" if not known."""
        buffer = ctypes.create_string_buffer(96)
        if self._works("nvmlSystemGetDriverVersion", buffer, ctypes.c_uint(len(buffer))):
            return buffer.value.decode(errors="replace")
        return ""

    def memory_mib(self, pci_bus: str) -> int | None:
        """The card's memory as nvidia-smi shows it, in MiB; None if not known (GB10 and Jetson have no own memory)."""
        memory = self._memory(self._handle(pci_bus))
        return (memory.total >> 20 or None) if memory else None

    def occupancy(self, pci_bus: str) -> Occupancy:
        """What uses the card now."""
        handle, rates = self._handle(pci_bus), _NvmlUtilization()
        memory = self._memory(handle)
        known = handle is not None and self._works("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(rates))
        return Occupancy(
            free_mib=memory.free >> 20 if memory and memory.total else None,
            busy_percent=int(rates.gpu) if known else None,
            holders=self._holders(handle) if handle is not None else (),
        )

    def _handle(self, pci_bus: str) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        found = self._works("nvmlDeviceGetHandleByPciBusId_v2", pci_bus.encode(), ctypes.byref(handle))
        return handle if found else None

    def _memory(self, handle: ctypes.c_void_p | None) -> _NvmlMemory | None:
        memory = _NvmlMemory()
        known = handle is not None and self._works("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return memory if known else None

    def _holders(self, handle: ctypes.c_void_p) -> tuple[Holder, ...]:
        """The processes that have memory on the card, the largest first; in a container the driver may hide them."""
        held: dict[int, int | None] = {}
        for function in _NVML_PROCESS_LISTS:
            count, room = ctypes.c_uint(_MOST_HOLDERS), (_NvmlProcess * _MOST_HOLDERS)()
            if self._works(function, handle, ctypes.byref(count), room):
                for process in room[: min(count.value, _MOST_HOLDERS)]:
                    held[process.pid] = None if process.bytes == _NVML_UNKNOWN_BYTES else process.bytes >> 20
        holders = (Holder(pid, self._process_name(pid), mib) for pid, mib in held.items())
        return tuple(sorted(holders, key=lambda holder: (-(holder.mib or 0), holder.pid)))

    def _process_name(self, pid: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        name = ""
        if self._works("nvmlSystemGetProcessName", ctypes.c_uint(pid), buffer, ctypes.c_uint(len(buffer))):
            # The first word: what follows are arguments, which may hold anything, a token among it.
            name = (buffer.value.decode(errors="replace").split() or [""])[0].rpartition("/")[2]
        if not name:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
        return name[:60] if name.isprintable() else ""


def load(name: str) -> ctypes.CDLL | None:
    """A shared library of the driver; None where this machine has none."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


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
