"""What the CUDA driver says of the cards in this machine, through ctypes and without a CUDA context."""

from __future__ import annotations

import ctypes
from pathlib import Path

from fixer.base.errors import CardError
from fixer.machine.cards import Card
from fixer.machine.nvml import Nvml, Occupancy

_CUDA_LIBRARY = "libcuda.so.1"


_NO_CARD = (34, 100)
"""cuInit's answers that mean "no card here": CUDA_ERROR_STUB_LIBRARY (libcuda without a driver), ..._NO_DEVICE."""


_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SHARED_MEMORY_OPTIN = 75, 76, 97
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR, ..._MAX_SHARED_MEMORY_PER_BLOCK_OPTIN (cuda.h)."""


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


def load(name: str) -> ctypes.CDLL | None:
    """A shared library of the driver; None where this machine has none."""
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
    with Nvml() as nvml:
        driver = nvml.driver() or _kernel_module_version()
        return tuple(_read_card(cuda, nvml, index, driver) for index in range(cuda.count()))


def _started_driver() -> _CudaDriver | None:
    """CUDA's driver, ready to be asked; None without a driver or a card.

    Raises:
        CardError: there is a driver, and it fails.
    """
    library = load(_CUDA_LIBRARY)
    if library is None:
        return None
    cuda = _CudaDriver(library)
    started = cuda.code("cuInit", ctypes.c_uint(0))
    if started in _NO_CARD:
        return None
    cuda.check("cuInit", started)
    return cuda


def _read_card(cuda: _CudaDriver, nvml: Nvml, index: int, driver: str) -> Card:
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
    with Nvml() as nvml:
        return nvml.occupancy(cuda.text("cuDeviceGetPCIBusId", device))
