"""The number format of a layer's experts, and the values that the rules for it share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from fixer.model.rules.family import NONE
from fixer.workload import NumberFormat

FP8_ARCH = 89
"""Triton compiles fp8e4nv from this architecture on."""


_FP8_REMEDY = "use a 4-bit AWQ or GPTQ checkpoint, or an INT8 one with --quantization w8a8_int8"


class Fate(Enum):
    """What becomes of the experts."""

    TRITON = "the fused MoE Triton kernel runs"
    OTHER = "another kernel runs"
    LOAD_ERROR = "SGLang stops while it loads the model"
    CRASH = "the fused MoE Triton kernel is asked for and does not compile"
    UNCERTAIN = "not known"


@dataclass(frozen=True)
class Scheme:
    """How the experts' weights are held and which kernel multiplies them.

    Attributes:
        fate: what becomes of them.
        method: SGLang's name for the quantisation, "none" for an unquantised model.
        kernel: for `Fate.OTHER` the kernel's name.
        reason: for everything but `Fate.TRITON` one sentence.
        number_format, block_shape, per_channel, group_size, has_zero_points: as in `fixer.workload.Workload`.
        packed: two 4-bit weights to a byte, so N in the file name is half.
        pad_to: N is rounded up to a multiple of this.
        experts_quantized: False where the experts are left out of the quantisation.
        label: `method`, or a finer name that `fixer.model.rules.families` has rules for.
        notes: what else a user should know.
    """

    fate: Fate
    method: str
    kernel: str = ""
    reason: str = ""
    number_format: NumberFormat = NumberFormat.NONE
    block_shape: tuple[int, int] | None = None
    per_channel: bool = False
    group_size: int = 0
    has_zero_points: bool = False
    packed: bool = False
    pad_to: int = 1
    experts_quantized: bool = True
    label: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What decides the scheme.

    Attributes:
        quant_config: the checkpoint's quantisation, None for none.
        flag: `--quantization` in lower case, None for not given.
        runner: `--moe-runner-backend`.
        arch: the card's architecture, 89 for compute capability 8.9.
        release: SGLang's release.
        methods: those that its tree has, empty where that is not known.
        hidden: hidden size, in elements.
        width: the experts' intermediate size on one rank, in elements.
        tp_size: tensor parallel ranks.
        layers: names of some expert modules ("model.layers.3.mlp.experts"), one row for each layer that is looked at,
            each with the spellings that a checkpoint may use.
        rescue: text that says which parallel sizes keep N a multiple of 128, "" for none.
    """

    quant_config: Mapping[str, Any] | None
    flag: str | None
    runner: str
    arch: int
    release: str
    hidden: int
    width: int
    tp_size: int
    layers: tuple[tuple[str, ...], ...]
    rescue: Callable[[int], str]
    methods: frozenset[str] = frozenset()


PLAIN = Scheme(Fate.TRITON, NONE, label=NONE)


def unquantized(scheme: Scheme) -> Scheme:
    """The scheme of experts that stay in the model's own type."""
    return replace(
        scheme,
        experts_quantized=False,
        notes=(*scheme.notes, "the checkpoint leaves the experts unquantised"),
    )


def refuse(scheme: Scheme, reason: str) -> Scheme:
    """The scheme of a checkpoint that SGLang refuses to load, and why."""
    return replace(scheme, fate=Fate.LOAD_ERROR, reason=reason)


def by_other_kernel(scheme: Scheme, kernel: str, reason: str) -> Scheme:
    """The scheme of experts that another kernel computes, and why."""
    return replace(scheme, fate=Fate.OTHER, kernel=kernel, reason=reason)


def needs_capability(scheme: Scheme, question: Question, least: int) -> Scheme | None:
    """A refusal where the card is older than the method allows."""
    if question.arch >= least:
        return None
    return refuse(
        scheme,
        f"SGLang stops: {scheme.method} needs compute capability {least // 10}.{least % 10}, this card has "
        f"{question.arch // 10}.{question.arch % 10}; {_FP8_REMEDY}",
    )


def fp8_on(question: Question, scheme: Scheme) -> Scheme:
    """FP8 experts: refused below 8.0, asked for and not compilable below 8.9."""
    refused = needs_capability(scheme, question, 80)
    if refused or question.arch >= FP8_ARCH:
        return refused or scheme
    online = question.quant_config is None
    cure = "leave --quantization fp8 out" if online else f"no SGLang flag cures it, {_FP8_REMEDY}"
    return replace(
        scheme,
        fate=Fate.CRASH,
        reason=f"SGLang asks for a file, and then Triton fails: fp8e4nv needs compute capability 8.9, this card has "
        f"{question.arch // 10}.{question.arch % 10}; {cure}",
    )


def in_blocks(question: Question, scheme: Scheme, block: tuple[int, int]) -> Scheme:
    """Block-wise scales, refused where the shard is no whole number of blocks (fp8.py:1135-1148)."""
    rows, columns = block
    for edge, which in ((rows, "block_n"), (columns, "block_k")):
        if question.width % edge and (which == "block_n" or question.tp_size > 1):
            return refuse(
                scheme,
                f"SGLang stops: the experts' shard is {question.width} wide, not divisible by the scales' "
                f"{which} = {edge}; {question.rescue(edge)}",
            )
    return replace(scheme, block_shape=block)


def weight_only_scheme(scheme: Scheme, bits: int, group: int, zero_points: bool) -> Scheme:
    """The scheme of 4-bit or 8-bit weights with 16-bit activations."""
    packed = bits == 4
    return replace(
        scheme,
        number_format=NumberFormat.INT4_W4A16 if packed else NumberFormat.INT8_W8A16,
        group_size=group,
        has_zero_points=zero_points,
        packed=packed,
    )


Handler = Callable[[Question, Scheme], Scheme]
