"""A pretended card: torch and Triton report one, and nothing reaches a driver.

SGLang's modules read the card's capability while they are imported, so this comes before the first of them.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
import triton

CUDA_VERSION = "13.0"
"""What a build of torch without CUDA is said to be made for: `torch.version.cuda` decides that this is not ROCm."""


class _Idle:
    """A stream, an event, a graph pool or a context of the card, which does nothing."""

    cuda_stream = 0
    device_index = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Card:
    """The card's facts, which may change between questions of one capability.

    Attributes:
        name: as the CUDA driver writes it.
        major, minor: compute capability.
        shared_memory: opt-in shared memory per block, in bytes.
        memory: in bytes.
        processors: streaming multiprocessors.
        count: cards of the machine.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.set(facts)

    def set(self, facts: dict[str, Any]) -> None:
        """Take over another card's facts (`Question.to_json`)."""
        self.name = str(facts["name"])
        self.major, self.minor = (int(number) for number in facts["capability"])
        self.shared_memory = int(facts["shared_memory"])
        self.memory = int(facts["memory_mib"]) << 20
        self.processors = int(facts["processors"])
        self.count = int(facts["count"])

    def properties(self, *_: Any) -> types.SimpleNamespace:
        """What `torch.cuda.get_device_properties` gives."""
        return types.SimpleNamespace(
            name=self.name,
            major=self.major,
            minor=self.minor,
            total_memory=self.memory,
            multi_processor_count=self.processors,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared_memory,
            shared_memory_per_multiprocessor=self.shared_memory + 1024,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            warp_size=32,
            L2_cache_size=50 << 20,
            is_integrated=0,
            is_multi_gpu_board=0,
            uuid="00000000-0000-0000-0000-000000000000",
            pci_bus_id=0,
            pci_device_id=0,
            pci_domain_id=0,
        )

    def capability(self, *_: Any) -> tuple[int, int]:
        """What `torch.cuda.get_device_capability` gives."""
        return self.major, self.minor


def pretend_card(card: Card) -> None:
    """Make torch and Triton speak of that card. Its facts are read at each call."""
    if torch.version.cuda is None:
        torch.version.cuda = CUDA_VERSION
    cuda: Any = torch.cuda
    free = max(0, card.memory - (512 << 20))
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: card.major >= 8,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: card.count,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: card.name,
        "get_device_capability": card.capability,
        "get_device_properties": card.properties,
        "get_arch_list": lambda: [f"sm_{card.major}{card.minor}"],
        "mem_get_info": lambda *_: (free, card.memory),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "can_device_access_peer": lambda *_: True,
        "current_stream": lambda *_: _Idle(),
        "default_stream": lambda *_: _Idle(),
        "stream": lambda *_: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
    }
    for name in ("set_device", "set_stream", "_lazy_init", "init", "synchronize", "empty_cache", "ipc_collect"):
        answers[name] = lambda *_, **__: None
    for name in ("Stream", "Event", "ExternalStream", "device", "device_of"):
        answers[name] = type(name, (_Idle,), {})
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    triton.runtime.driver.set_active(_Driver(card))


class _Driver:
    """Triton's driver: decorators and autotuners ask it for the target while modules are imported."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.utils = types.SimpleNamespace(
            get_device_properties=self.get_device_properties, load_binary=_no_launch, set_printf_fifo_size=_no_launch
        )
        self.launcher_cls = _Idle

    def get_device_properties(self, *_: Any) -> dict[str, Any]:
        return {
            "max_shared_mem": self._card.shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": self._card.processors,
            "warpSize": 32,
            "sm_clock_rate": 1_500_000,
            "mem_clock_rate": 1_500_000,
            "mem_bus_width": 384,
        }

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._card.major * 10 + self._card.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, *_: Any) -> None:
        pass

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> Any:
        return torch.empty(0, device="meta")

    def get_benchmarker(self) -> Any:
        return _no_launch

    def clear_cache(self, *_: Any) -> None:
        pass


def _no_launch(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel is compiled, timed or loaded while SGLang is asked")
