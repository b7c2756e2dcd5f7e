"""What a GPU error in SGLang's log means: which kernel, what it needs, what the card has, and what to do about it.

A table of errors and a table of kernels, matched against an error's line and the traceback above it. Flags and kernels'
names are SGLang 0.5.17's; the errors' words were taken from public reports (named behind the entries). Several ranks
write into one log, so the frames above an error may be another rank's: they fail alike.

Triton writes an error's class first (CompilationError, PTXASError) and its reason some lines below, so a class is held
back for `PATIENCE` seconds: a reason that comes in that time is explained in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fixer.serve.log.signs import KERNELS, SIGNS, UNKNOWN, Fault, Kernel

FRAMES = 400
"""Lines above an error in which its kernel is looked for: a traceback of SGLang has 60 to 150; ranks interleave."""

MOST = 12
"""No log gets more explanations than this."""

PATIENCE = 1.0
"""Seconds that an error's class waits for its reason. A traceback is written at once."""


_LAUNCH = re.compile(r"^\s*(?P<name>[A-Za-z_]\w{2,80})\[[^\]]{0,200}\]\(")


@dataclass(frozen=True)
class Explanation:
    """One explained error.

    Attributes:
        fault, kernel: what went wrong, and where.
        needs, has: what is needed and what there is, 0 where the error does not say: bytes of shared memory a block;
            columns of tensor memory; threads; for BLOCKS a shard's size and the checkpoint's block.
        launched: the unknown kernel's own name, "" where none was seen.
        waits: the line gave a class of errors only.
    """

    fault: Fault
    kernel: Kernel
    needs: int = 0
    has: int = 0
    launched: str = ""
    waits: bool = False

    def explain(self, card: str, *, installed: bool) -> tuple[str, ...]:
        """The explanation, one line each.

        Args:
            card: the card's name, "" where it is not known.
            installed: moefix installed files for the MoE kernel.
        """
        where = self.kernel.name + (f" ({self.launched})" if self.launched else "") + ": "
        return (
            f"SGLang's error above: {'' if self.kernel is _NOWHERE else where}{self._what(card)}",
            f"  {self._cure(installed)}",
        )

    def _what(self, card: str) -> str:
        if not self.needs:
            return self.fault.value
        if self.fault is Fault.BLOCKS:
            return f"{self.fault.value}: a shard of {self.needs} is no multiple of {self.has}"
        what = _RESOURCES.get(self.fault, "{} bytes of shared memory a block").format(self.needs)
        return f"it needs {what}, and {card or 'the card'} has {self.has}: {self.needs - self.has} too many"

    def _cure(self, installed: bool) -> str:
        if self.fault in _CURES:
            return _CURES[self.fault]
        if not self.kernel.reads_moe_file:
            newer = "A newer driver, or the Triton that SGLang asks for, may; else "
            return f"A MoE file cannot cure that. {newer if self.fault is Fault.COMPILE else 'What helps: '}" + (
                self.kernel.cure
            )
        start = _MOE_CURES.get(self.fault, "A MoE file cures that")
        if self.fault in (Fault.COMPILE, Fault.INSTRUCTION):
            return f"{start}: moefix tunes with what compiles. {_FRESH}"
        if installed:
            return f"{start}, and moefix had installed one: the verdict above says which file SGLang took. {_FRESH}"
        return f"{start}: {self.kernel.cure}"


_FRESH = "Start with --moefix-fresh, and report it if it comes again"

_MOE_CURES = {
    Fault.COMPILE: "A MoE file with other tiles may cure that",
    Fault.INSTRUCTION: "A MoE file without USE_TMA may cure that",
    Fault.TENSOR_MEMORY: "A MoE file cures that (a smaller BLOCK_SIZE_M or BLOCK_SIZE_N; fewer stages do not)",
    Fault.THREADS: "A MoE file cures that (fewer warps)",
}
"""What a MoE file does about a fault of its own kernel."""

_RESOURCES = {Fault.TENSOR_MEMORY: "{} columns of tensor memory", Fault.THREADS: "{} threads a block"}

_CURES = {
    Fault.OLD_COMPILER: (
        "A MoE file cannot cure that. Set TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH from Triton 3.6 on) to the "
        "ptxas of a CUDA toolkit that knows the card, such as CUDA 13's /usr/local/cuda/bin/ptxas, or install the "
        "Triton that this SGLang asks for; where nvcc said it, a newer CUDA toolkit"
    ),
    Fault.BLOCKS: (
        "A MoE file cannot cure that. What helps: a smaller --tp-size, so that every shard is a multiple of the block. "
        "--ep-size splits the routed experts only: shared experts and dense layers stay split over --tp-size"
    ),
    Fault.DEEP_GEMM: (
        "A MoE file cannot cure that. What helps: SGLANG_ENABLE_JIT_DEEPGEMM=0 in the environment "
        "(SGL_ENABLE_JIT_DEEPGEMM=0 before 0.5.3), --fp8-gemm-backend triton and --moe-runner-backend triton, or "
        "newer sglang-kernel packages; attention by DeepGEMM (DSA) needs another --attention-backend"
    ),
    Fault.ASYNCHRONOUS: (
        "Kernels run while Python goes on, so the frames above may be innocent: start once with CUDA_LAUNCH_BLOCKING=1 "
        "and --disable-cuda-graph, and the frames name the kernel. A MoE file is hardly the reason"
    ),
    Fault.FP8: (
        "A MoE file cannot cure that: FP8 needs compute capability 8.9 or more. What helps: the bf16 checkpoint, or "
        "one in AWQ or GPTQ, which Marlin runs"
    ),
    Fault.GATE_UP_TMA: "moefix writes no such file. Move that file away, or let moefix tune: --moefix-fresh",
    Fault.NO_COMPILER: (
        "A MoE file cannot cure that. Install a C compiler and Python's headers (Debian: gcc python3-dev), or run "
        "moefix's image; `moefix doctor` checks for both"
    ),
    Fault.GPU_MEMORY: (
        "That is the GPU's memory, not a block's shared memory: no MoE file changes it. What helps: another "
        "--mem-fraction-static (lower if it fails while serving, higher if it asks for that), a smaller "
        "--chunked-prefill-size, --cuda-graph-max-bs or --context-length, or more cards (--tp); `nvidia-smi` says who "
        "else holds memory"
    ),
    Fault.NO_IMAGE: (
        "A MoE file cannot cure that. The packages are built for other cards: install PyTorch, sglang-kernel and "
        "flashinfer for this card's CUDA version"
    ),
}


def find(error: str, above: Iterable[str]) -> Explanation | None:
    """What an error line means, None where it is none of the table.

    Args:
        error: the line.
        above: the lines before it, the nearest first.
    """
    for sign in SIGNS:
        match = sign.pattern.search(error)
        if match is None:
            continue
        named = match.groupdict()
        needs, has = int((named.get("needs") or "0")[:12]), int((named.get("has") or "0")[:12])
        if sign.fault in _WITHOUT_KERNEL:
            return Explanation(sign.fault, _NOWHERE, needs, has)
        kernel, launched = _kernel(error, above)
        if kernel is UNKNOWN and sign.fault is Fault.CUTLASS:
            kernel, launched = _CUTLASS, ""
        return Explanation(sign.fault, kernel, needs, has, launched, sign.waits)
    return None


_WITHOUT_KERNEL = (
    Fault.GPU_MEMORY,
    Fault.NO_COMPILER,
    Fault.NO_IMAGE,
    Fault.OLD_COMPILER,
    Fault.BLOCKS,
    Fault.DEEP_GEMM,
    Fault.ASYNCHRONOUS,
)
_NOWHERE = Kernel("not in one kernel", (), "")


def _kernel(error: str, above: Iterable[str]) -> tuple[Kernel, str]:
    """The kernel that the error's own line or the nearest frame above names, and an unknown one's launch."""
    launched = ""
    for line in (error, *above):
        for kernel in KERNELS:
            if any(mark in line for mark in kernel.marks):
                return kernel, ""
        if not launched and (found := _LAUNCH.match(line)):
            launched = found["name"]
    return UNKNOWN, launched


_CUTLASS = next(kernel for kernel in KERNELS if "cutlass_moe" in kernel.marks)


class Diagnosis:
    """Explains each kind of error once."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()
        self._held: Explanation | None = None
        self._due: float | None = None

    @property
    def wakes_at(self) -> float | None:
        """The time, on the clock of `now`, at which `news` has an explanation that waited; None for none."""
        return self._due

    def see(self, line: str, above: Iterable[str], now: float = 0.0) -> Explanation | None:
        """What a line means, None where it is no error, one of a kind that was explained before, or one that waits.

        Args:
            line, above: as `find` takes them.
            now: a monotonic clock, in seconds.
        """
        finding = find(line, above) if len(self._said) < MOST else None
        if finding is None:
            return None
        if finding.waits:
            if self._held is None and self.kind(finding) not in self._said:
                self._held, self._due = finding, now + PATIENCE
            return None
        if self._held is not None and finding.fault in _REASONS:
            held, self._held, self._due = self._held, None, None
            first = self._first(finding)
            self._said.add(self.kind(held))
            return first
        return self._first(finding)

    def news(self, now: float = float("inf")) -> Explanation | None:
        """An error's class whose reason has not come in time; without `now` at the log's end, where none will."""
        if self._held is None or self._due is None or now < self._due:
            return None
        finding, self._held, self._due = self._held, None, None
        return self._first(finding)

    def _first(self, finding: Explanation) -> Explanation | None:
        if self.kind(finding) in self._said:
            return None
        self._said.add(self.kind(finding))
        return finding

    @staticmethod
    def kind(finding: Explanation) -> tuple[str, str, str]:
        """What makes two errors alike."""
        return (finding.fault.name, finding.kernel.name, finding.launched)


_REASONS = (
    Fault.COMPILE,
    Fault.FP8,
    Fault.GATE_UP_TMA,
    Fault.NO_COMPILER,
    Fault.OLD_COMPILER,
    Fault.INSTRUCTION,
    Fault.SHARED_MEMORY,
    Fault.TENSOR_MEMORY,
    Fault.THREADS,
)
"""What Triton writes below "CompilationError" or "PTXASError"."""
