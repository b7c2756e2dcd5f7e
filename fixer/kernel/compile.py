"""Compile one candidate of SGLang's kernel for one architecture, with neither a GPU nor PyTorch.

The kernel is taken from SGLang's source file: its `@triton.jit` functions, with every other line left blank. Line
numbers stay as they are on purpose: Triton's cache key holds a function's source and its line, so what is compiled
here is the server's own cache entry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from fixer.base.errors import CompileError, SGLangError
from fixer.families.fused_moe.arguments import LaunchContext, Product, Role, launch_arguments, operands
from fixer.families.fused_moe.arguments import padded_tokens as sorted_length_of
from fixer.families.registry import family_of
from fixer.kernel.source import SWAP_RULE, KernelSource, load_kernels
from fixer.machine.cards import Card
from fixer.sglang.cut import code_of, namespace
from fixer.sglang.stand_ins import card_stand_ins
from fixer.workload import AnyWorkload, NumberFormat, Projection, Tile, Workload


class CompileOutcome(Enum):
    """How the compilation of a candidate ended."""

    OK = "ok"
    FAILED = "compile error"
    DEADLINE = "compile deadline"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        source: SGLang's kernel.
        arch: an architecture (89, 90, 120).
        folder: where files may be kept.
        card: the card's name; 0.5.8 launches differently on one card of an architecture.
    """

    source: KernelSource
    arch: int
    folder: Path
    card: str = ""


@dataclass(frozen=True)
class Candidate:
    """A tile for a projection of a workload.

    `tokens` is None for a compilation that is valid for every M (the token counts are taken as divisible by
    nothing), or the M whose exact argument specialisation is wanted, as the server's own launch would have it.
    `sorted_output`: a gate-up kernel before a down kernel with tensor descriptors, which reads rows in sorted order.
    """

    workload: AnyWorkload
    projection: Projection
    tile: Tile
    tokens: int | None = None
    sorted_output: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came of compiling a candidate.

    Attributes:
        shared_bytes: shared memory a block needs; 0 unless the outcome is OK.
        seconds: how long it took; about 0 for one that Triton's cache already had.
        message: the compiler's complaint, "" where there is none.
    """

    outcome: CompileOutcome
    shared_bytes: int = 0
    seconds: float = 0.0
    message: str = ""


class _PlanningDriver:
    """Stands in for the CUDA driver, so that Triton compiles for a card that is not there."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one number for each architecture keeps them apart.
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def planning_driver(arch: int) -> Iterator[None]:
    """Have Triton believe that the current device is of an architecture, in this process."""
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
    except ImportError as error:
        raise CompileError("Triton is not installed.", "pip install triton (Linux only).") from error
    # Up to 3.4 the active driver is a plain attribute; since 3.5 it is a property that would begin a real one.
    name = "_active" if hasattr(driver, "_active") else "active"
    before = getattr(driver, name)
    driver.set_active(_PlanningDriver(GPUTarget("cuda", arch, 32)))
    try:
        yield
    finally:
        setattr(driver, name, before)


_ANY_TOKENS = 1009
"""A prime: compiled with token counts that are multiples of nothing, a kernel is right for all of them."""


def compile_candidate(target: Target, candidate: Candidate) -> Compiled:
    """Compile under `planning_driver`; a candidate that does not compile is an outcome, not an error."""
    started = time.monotonic()
    try:
        kernel = warm_kernel(target, candidate)
    except SGLangError:
        raise
    except Exception as error:  # whatever the compiler throws at a bad tile
        return Compiled(CompileOutcome.FAILED, seconds=time.monotonic() - started, message=complaint(error))
    return Compiled(CompileOutcome.OK, int(kernel.metadata.shared), time.monotonic() - started)


def complaint(error: BaseException) -> str:
    """One line of a compiler's or loader's error: its name and what it says.

    Triton's CompilationError begins with the place and ends with the reason; others begin with what matters.
    """
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    name = type(error).__name__
    return f"{name}: {lines[-1 if name == 'CompilationError' else 0]}"[:500]


def warm_kernel(target: Target, candidate: Candidate) -> Any:
    """Triton's compiled kernel for a candidate, from its cache where it is there; nothing is launched."""
    function = kernel_function(target, candidate.workload)
    return function.warmup(**compile_arguments(function, target, candidate), grid=(1,))


def kernel_function(target: Target, workload: AnyWorkload) -> Any:
    """The `@triton.jit` function that a workload runs."""
    return getattr(load_kernels(target.source, target.folder), family_of(workload).kernel_name(workload))


def swaps_operands(target: Target, workload: AnyWorkload, tile: Tile) -> bool:
    """Whether SGLang swaps the operands of a launch, by its own rule."""
    is_fp8 = family_of(workload).number_format(workload) is NumberFormat.FP8_W8A8
    rule = _swap_rule(target.source.swap_rule, target.arch, target.card) if target.source.swap_rule and is_fp8 else None
    return bool(rule and rule(tile.block_m, tile.block_n))


@lru_cache(maxsize=8)
def _swap_rule(text: str, arch: int, card: str) -> Any:
    space = namespace(card_stand_ins(Card(card, divmod(arch, 10), 0, 0)))
    exec(code_of(text), space)  # noqa: S102 (a function of the user's own SGLang, cut out)
    return space[SWAP_RULE]


def compile_arguments(function: Any, target: Target, candidate: Candidate) -> dict[str, Any]:
    """The arguments of a candidate's launch, with shapes in the place of tensors."""
    workload, tile = candidate.workload, candidate.tile
    assert isinstance(workload, Workload)  # the only family that is compiled so far
    anything = candidate.tokens is None
    product = Product(workload, candidate.projection, _ANY_TOKENS if candidate.tokens is None else candidate.tokens)
    length = _ANY_TOKENS if anything else sorted_length_of(workload, product.tokens, tile.block_m)
    tensors = operands(product, tile, length)
    context = LaunchContext(
        arch=target.arch,
        compute_type=compute_type(workload),
        swap_ab=swaps_operands(target, workload, tile),
        descriptors=tensor_descriptors(product, tile, tensors[Role.A], tensors[Role.B]),
        valid_tokens=_ANY_TOKENS if anything else None,
        sorted_output=candidate.sorted_output,
    )
    return launch_arguments([parameter.name for parameter in function.params], product, tile, tensors, context)


def compute_type(workload: Workload) -> Any:
    """The kernel's `compute_type`: SGLang takes float16 for everything but bfloat16 (fused_moe.py:488)."""
    import triton.language as tl

    return tl.bfloat16 if workload.activation_dtype == "bfloat16" else tl.float16


def tensor_descriptors(product: Product, tile: Tile, a: Any, b: Any) -> tuple[Any, Any] | None:
    """The descriptors of A and B where a tile asks for them, else None.

    The gate-up product gathers its rows, so that only its weights can be described (fused_moe.py:627 of 0.5.18).
    """
    if not tile.use_tma:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(tensor: Any, block: list[int]) -> Any:
        strides = [tensor.stride(dimension) for dimension in range(len(tensor.shape))]
        return TensorDescriptor(tensor, list(tensor.shape), strides, block)

    described = None if product.is_up else describe(a, [tile.block_m, tile.block_k])
    return described, describe(b, [1, tile.block_n, tile.block_k])
