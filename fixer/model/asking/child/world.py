"""A pretended parallel world on the meta device: no other rank, no card, no weights, no kernel compiled."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_JIT_MODULES = ("sglang.kernels.jit.utils.compile", "sglang.kernels.jit.utils", "sglang.jit_kernel.utils")


def pretend_world() -> None:
    """`torch.distributed` makes groups that talk to nobody, so that SGLang's own arithmetic of ranks works."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for module in (dist, dist.distributed_c10d):
        for name, keeps in (("init_process_group", {"rank", "world_size"}), ("new_group", {"ranks"})):
            setattr(module, name, _on_nobody(getattr(dist.distributed_c10d, name), keeps, FakeStore))
    torch.compile = _as_it_is


def _on_nobody(function: Callable[..., Any], keeps: set[str], store: type) -> Callable[..., Any]:
    if getattr(function, "on_nobody", False):
        return function

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        positional = args[:1] if "ranks" in keeps else ()
        kept = {name: value for name, value in kwargs.items() if name in keeps}
        more = {} if "ranks" in keeps else {"store": store()}
        return function(*positional, backend="fake", **kept, **more)

    made.on_nobody = True  # type: ignore[attr-defined]
    return made


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """`torch.compile` and SGLang's registering of custom operators, used as decorators with or without arguments."""
    return (lambda given: given) if function is None else function


def plain_operators() -> None:
    """Leave SGLang's custom operators plain functions, before the modules that define some are imported.

    A registered operator meets meta tensors with its fake implementation, which returns at once: nothing would be
    looked up.
    """
    with contextlib.suppress(ImportError):
        custom = importlib.import_module("sglang.srt.utils.custom_op")
        for name in ("register_custom_op", "register_custom_op_from_extern"):
            if hasattr(custom, name):
                setattr(custom, name, _as_it_is)
    common = importlib.import_module("sglang.srt.utils.common")
    for module in (common, importlib.import_module("sglang.srt.utils")):
        if hasattr(module, "direct_register_custom_op"):
            module.direct_register_custom_op = lambda *_, **__: None  # type: ignore[attr-defined]
        if hasattr(
            module, "get_nvgpu_memory_capacity"
        ):  # it would run nvidia-smi, for another card than the one asked about
            module.get_nvgpu_memory_capacity = lambda *_, **__: torch.cuda.mem_get_info()[1] >> 20  # type: ignore[attr-defined]


def no_compiling() -> None:
    """SGLang's just-in-time kernels are refused: where nvcc is there, each would really be compiled (10 to 20 s)."""
    for name in _JIT_MODULES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "load_jit"):
                module.load_jit = _refuse  # type: ignore[attr-defined]


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel is compiled while SGLang is asked")


def lonely_groups() -> None:
    """What a group of ranks starts to talk to the others is left out."""
    for module, names in (
        ("sglang.srt.distributed.device_communicators.pynccl", ("PyNcclCommunicator",)),
        ("sglang.srt.distributed.device_communicators.shm_broadcast", ("MessageQueue",)),
    ):
        with contextlib.suppress(ImportError):
            loaded = importlib.import_module(module)
            for name in names:
                setattr(loaded, name, _Silent)


class _Silent:
    """A communicator that has nobody to talk to."""

    disabled = True
    available = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def create_from_process_group(*_: Any, **__: Any) -> None:
        return None


def _is_card(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or str(device).split(":")[0] == "cuda"


class OnMeta(TorchFunctionMode):  # type: ignore[misc]
    """Whatever asks for the card's memory gets a meta tensor: `device="cuda"`, `device=0`, `.cuda()`, `.to("cuda")`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0].to("meta")
        if name in ("pin_memory", "record_stream"):
            return args[0]
        if _is_card(kwargs.get("device")):
            kwargs["device"] = "meta"
        if name == "to":
            args = (args[0], *("meta" if isinstance(a, (str, torch.device)) and _is_card(a) else a for a in args[1:]))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class OnCpu(TorchFunctionMode):  # type: ignore[misc]
    """Whatever asks for the card's memory gets the machine's: for the few tensors whose numbers count."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_card(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if getattr(func, "__name__", "") in ("to", "cuda", "pin_memory"):
            args = tuple("cpu" if isinstance(a, (str, torch.device)) and _is_card(a) else a for a in args)
            if func.__name__ != "to":
                return args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Triton kernels return at once, so that a layer's forward goes on to its end with meta tensors."""
    from triton.runtime import autotuner, jit

    places = [(jit.JITFunction, "run"), (autotuner.Autotuner, "run"), (autotuner.Heuristics, "run")]
    kept = [getattr(kind, name) for kind, name in places]
    for kind, name in places:
        setattr(kind, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for (kind, name), run in zip(places, kept, strict=True):
            setattr(kind, name, run)
