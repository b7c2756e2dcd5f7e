"""The card: SGLang's name for it, architecture, opt-in shared memory, memory.

A card comes from one of two places: the table in data/cards.json (`find_card`), or the driver (`visible_cards`).

The table's names are the CUDA driver's, its memory is what nvidia-smi shows. Jetson and GB10 share the machine's
memory, and nvidia-smi shows none: theirs is CUDA's total on a common configuration. SGLang takes its memory class from
that number and nothing else does, so a few MiB more or less, as between two driver releases, change nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

from fixer.base.errors import CardError, UsageError

SHARED_MEMORY_BYTES = {
    (7, 0): 98304,
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (11, 0): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
"""Opt-in shared memory per block in bytes by compute capability: CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability" (maximum per block, 1 KiB a block being CUDA's own). 10.3 and 11.0 are as 10.0 there."""

SMALLEST_LIMIT = 1024
"""`--smem-limit` under this is a slip of the hand (kilobytes for bytes): no kernel with a tile fits into it."""


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


# --- the table -------------------------------------------------------------------------------------------------------

_NOISE = ("nvidia", "geforce", "tesla", "rtx", "gpu", "generation", "edition")
"""Words that people leave out or add at will. No two cards of the table differ by these alone (a test holds that)."""


@dataclass(frozen=True)
class _Entry:
    card: Card
    keys: tuple[str, ...]


def _key(text: str) -> str:
    """What is left of a name when case, blanks, punctuation and noise words are gone: "4090", "4090d", "h100nvl"."""
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    for word in _NOISE:
        key = key.replace(word, "")
    return key


@lru_cache(maxsize=1)
def _table() -> tuple[_Entry, ...]:
    text = resources.files("fixer").joinpath("data/cards.json").read_text("utf-8")
    entries = []
    for row in json.loads(text):
        major, minor = (int(part) for part in row["capability"].split("."))
        card = Card(row["name"], (major, minor), SHARED_MEMORY_BYTES[major, minor], row["memory_mib"])
        entries.append(_Entry(card, tuple(_key(name) for name in (row["name"], *row.get("aliases", ())))))
    return tuple(entries)


def known_cards() -> tuple[Card, ...]:
    """Every card of the table, in its order: consumer, workstation, data centre, system on a chip."""
    return tuple(entry.card for entry in _table())


def find_card(text: str) -> Card:
    """The card of the table that a person means by `text`.

    Case, blanks, punctuation and words such as "NVIDIA", "GeForce" and "RTX" do not matter; everything else does, so
    that "4090" is never the 4090 D or the laptop's. Where a short name is sold in several builds that ask for
    different files, the table has one of them under it: "A100" is A100-SXM4-80GB, "H100" is H100 80GB HBM3, "V100" is
    V100-SXM2-32GB, "GH200" the 96 GB one, "RTX PRO 6000" the Workstation Edition, "4060 Ti" and "5060 Ti" the 8 GB.

    Raises:
        CardError: no card, or more than one, goes by that name; the message lists the near ones.
    """
    key = _key(text)
    matches = [entry.card for entry in _table() if key and key in entry.keys] or _by_memory(text)
    if matches:
        return matches[0]
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    near = _near_cards(key)
    fault = f"no card called {shown} is known" + (f"; near it: {', '.join(near)}" if near else "")
    raise CardError(
        fault,
        "Name the card as nvidia-smi -L does. For a card that is not in the table, take one of the same compute "
        "capability and, if its shared memory is smaller, --smem-limit BYTES.",
    )


def _by_memory(text: str) -> list[Card]:
    """The cards of a name that ends in their memory ("RTX 4090 24GB"), which nvidia-smi shows a little less of."""
    named = re.fullmatch(r"(.*[^0-9])\(?([0-9]{1,4}) ?gi?b?\)?", text.strip().lower())
    if named is None:
        return []
    key, sold = _key(named[1]), int(named[2]) * 1024
    cards = [entry.card for entry in _table() if key and key in entry.keys]
    return [card for card in cards if 0.9 * sold <= card.memory_mib <= 1.05 * sold]


def _near_cards(key: str, most: int = 6) -> tuple[str, ...]:
    """Names that hold `key` ("6000" is in five cards' names), else names that are spelt nearly so."""
    if not key:
        return ()
    holding = [entry for entry in _table() if any(key in candidate for candidate in entry.keys)]
    if not holding:
        spellings = [candidate for entry in _table() for candidate in entry.keys]
        close = difflib.get_close_matches(key[:60], spellings, n=most, cutoff=0.6)
        holding = [entry for candidate in close for entry in _table() if candidate in entry.keys]
    return tuple(dict.fromkeys(entry.card.name for entry in holding))[:most]


# --- the driver ------------------------------------------------------------------------------------------------------

_CUDA_LIBRARY = "libcuda.so.1"
_NVML_LIBRARY = "libnvidia-ml.so.1"
_NO_CARD = (34, 100)
"""cuInit's answers that mean "no card here": CUDA_ERROR_STUB_LIBRARY (libcuda without a driver), ..._NO_DEVICE."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SHARED_MEMORY_OPTIN = 75, 76, 97
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR, ..._MAX_SHARED_MEMORY_PER_BLOCK_OPTIN (cuda.h)."""


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


class _CudaDriver:
    """The few calls of libcuda that identify a card. Needs no context, so it takes no memory on the card."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, function: str, *arguments: object) -> None:
        """Call libcuda.

        Raises:
            CardError: the function is not there, or it answered with an error: the driver's text is in the message.
        """
        self.check(function, self.code(function, *arguments))

    def check(self, function: str, code: int) -> None:
        """Raise CardError where `code`, which `function` answered, is an error."""
        if code:
            raise CardError(
                f"the CUDA driver refused {function}: {self._describe(code)}",
                "Run nvidia-smi: if it fails too, the driver needs a reload or a reboot; in a container, check that "
                "the NVIDIA Container Toolkit matches the driver.",
            )

    def code(self, function: str, *arguments: object) -> int:
        """Call libcuda and return its CUresult, 0 where all went well."""
        try:
            return int(getattr(self._library, function)(*arguments))
        except AttributeError:
            raise CardError(f"{_CUDA_LIBRARY} has no {function}", "Install a current NVIDIA driver.") from None

    def _describe(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.code("cuGetErrorString", ctypes.c_int(code), ctypes.byref(text))
        return f"error {code}" + (f", {text.value.decode(errors='replace')}" if text.value else "")

    def count(self) -> int:
        """How many devices are visible; CUDA_VISIBLE_DEVICES has had its say already."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def attribute(self, device: ctypes.c_int, attribute: int) -> int:
        """One attribute of a device, as cuda.h numbers them."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        return value.value

    def text(self, function: str, device: ctypes.c_int) -> str:
        """What cuDeviceGetName or cuDeviceGetPCIBusId writes into a buffer."""
        buffer = ctypes.create_string_buffer(256)
        self.call(function, buffer, ctypes.c_int(len(buffer)), device)
        return buffer.value.decode(errors="replace")

    def total_bytes(self, device: ctypes.c_int) -> int:
        """The memory that CUDA can hand out, in bytes: a little less than nvidia-smi's total."""
        total = ctypes.c_size_t()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        return total.value


class _Nvml:
    """libnvidia-ml, where it is there: nvidia-smi's own numbers. Every failure means "not known", never a fault."""

    def __init__(self) -> None:
        self._library = _load(_NVML_LIBRARY)
        if self._library is not None and not self._works("nvmlInit_v2"):
            self._library = None

    def __enter__(self) -> _Nvml:
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


def _load(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _kernel_module_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text("ascii", "replace").strip()
    except OSError:
        return ""


def visible_cards() -> tuple[Card, ...]:
    """Every device that CUDA shows this process, in CUDA's order, read from the driver.

    CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER count as they do for SGLang, since the driver itself reads them. No
    context is made and torch is not imported. As with any use of CUDA, a process that forks afterwards cannot use the
    card in the child: start workers that need it by spawn or exec.

    Returns:
        One Card a device; empty without an NVIDIA driver or without a visible device.

    Raises:
        CardError: there is a driver, and it fails (error 803, say: library and kernel module do not match).
    """
    cuda = _started_driver()
    if cuda is None:
        return ()
    with _Nvml() as nvml:
        driver = nvml.driver() or _kernel_module_version()
        return tuple(_read_card(cuda, nvml, index, driver) for index in range(cuda.count()))


def _started_driver() -> _CudaDriver | None:
    """CUDA's driver, ready to be asked; None without a driver or a card.

    Raises:
        CardError: there is a driver, and it fails.
    """
    library = _load(_CUDA_LIBRARY)
    if library is None:
        return None
    cuda = _CudaDriver(library)
    started = cuda.code("cuInit", ctypes.c_uint(0))
    if started in _NO_CARD:
        return None
    cuda.check("cuInit", started)
    return cuda


def _read_card(cuda: _CudaDriver, nvml: _Nvml, index: int, driver: str) -> Card:
    device = ctypes.c_int()
    cuda.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    name = cuda.text("cuDeviceGetName", device)
    # A MIG slice has the bus id of the whole card, whose memory is not the slice's.
    whole_card = " MIG " not in name
    listed = nvml.memory_mib(cuda.text("cuDeviceGetPCIBusId", device)) if whole_card else None
    return Card(
        name=name,
        capability=(cuda.attribute(device, _CAPABILITY_MAJOR), cuda.attribute(device, _CAPABILITY_MINOR)),
        shared_memory=cuda.attribute(device, _SHARED_MEMORY_OPTIN),
        memory_mib=listed or cuda.total_bytes(device) >> 20,
        index=index,
        driver=driver,
    )


# --- what uses a card ------------------------------------------------------------------------------------------------

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


def occupancy(card: Card) -> Occupancy:
    """What uses a visible card now, as the driver tells it; nothing known for a card of the table or a MIG slice.

    Raises:
        CardError: there is a driver, and it fails.
    """
    # A MIG slice has the bus id of the whole card, whose numbers are not the slice's.
    cuda = None if card.index is None or " MIG " in card.name else _started_driver()
    if cuda is None:
        return Occupancy()
    device = ctypes.c_int()
    cuda.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(card.index or 0))
    with _Nvml() as nvml:
        return nvml.occupancy(cuda.text("cuDeviceGetPCIBusId", device))


# --- cards at large --------------------------------------------------------------------------------------------------


def with_shared_memory_limit(card: Card, limit_bytes: int) -> Card:
    """The card with less opt-in shared memory per block, for experiments (`--smem-limit`).

    Args:
        card: the card.
        limit_bytes: the new limit in bytes; only ever lower than the card's own.

    Raises:
        UsageError: the limit is above the card's own, or too small for any kernel.
    """
    if not SMALLEST_LIMIT <= limit_bytes <= card.shared_memory:
        raise UsageError(
            f"a shared memory limit of {limit_bytes} bytes makes no sense for {card.name}",
            f"Give --smem-limit in bytes, from {SMALLEST_LIMIT} to the card's own {card.shared_memory}.",
        )
    return replace(card, shared_memory=limit_bytes)


def kinds(cards: Sequence[Card]) -> tuple[tuple[Card, ...], ...]:
    """Group cards of one kind (name, capability, shared memory), in the order in which the kinds first come."""
    groups: dict[tuple[str, tuple[int, int], int], list[Card]] = {}
    for card in cards:
        groups.setdefault((card.name, card.capability, card.shared_memory), []).append(card)
    return tuple(tuple(group) for group in groups.values())
