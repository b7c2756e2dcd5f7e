"""Number formats of compressed-tensors checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fixer.model.rules.family import INT4_GROUP32
from fixer.model.rules.ignored import MAX_PATTERNS, Match, matches, skips
from fixer.model.rules.scheme import (
    Fate,
    Question,
    Scheme,
    by_other_kernel,
    fp8_on,
    in_blocks,
    refuse,
    unquantized,
    weight_only_scheme,
)
from fixer.model.rules.values import read_block_shape, read_integer, read_mapping, read_text
from fixer.sglang.releases import NEW, NEWEST, OLD, at_least, release_key
from fixer.workload import NumberFormat


@dataclass(frozen=True)
class _Group:
    """The config group of compressed-tensors that covers the experts."""

    bits: int
    kind: str
    strategy: str
    group_size: int
    symmetric: bool
    reordered: bool
    input_bits: int
    input_strategy: str
    input_dynamic: bool
    format: str
    block: tuple[int, int] | None

    @property
    def weight_only(self) -> bool:
        """No activation scheme, and scales by channel or group (compressed_tensors.py:545-558)."""
        return not self.input_bits and self.strategy in {"channel", "group"}

    @property
    def is_nvfp4(self) -> bool:
        return self.bits == 4 and self.kind == "float" and self.group_size == 16

    @property
    def is_fp8(self) -> bool:
        """compressed_tensors.py:454-490"""
        weights = self.bits == 8 and self.kind == "float" and self.symmetric
        inputs = self.input_bits == 8 and (self.input_dynamic or self.input_strategy == "tensor")
        return weights and inputs and self.strategy in {"tensor", "channel", "block"}


def compressed_tensors_scheme(question: Question, scheme: Scheme) -> Scheme:
    """compressed_tensors.py:get_moe_scheme"""
    skipped, notes = skips(question, Match.NAME, ".0.gate_proj")
    scheme = replace(scheme, notes=notes)
    if skipped:
        return unquantized(scheme)
    group = _group(question)
    if group is None:
        return replace(
            scheme,
            fate=Fate.UNCERTAIN,
            reason="no group of the compressed-tensors config covers the experts as far as moefix can see",
        )
    for applies, handler in (
        ("nvfp4" in group.format or group.is_nvfp4, _ct_nvfp4),
        (group.weight_only, _ct_weight_only),
        (group.is_fp8, _ct_fp8),
        (group.bits == 8 and group.kind == "int" and group.input_bits == 8, _ct_int8),
        (group.bits == 4 and group.input_bits == 8, _ct_w4a8),
    ):
        if applies:
            return handler(question, scheme, group)
    return refuse(scheme, "SGLang stops: it has no MoE kernel for this compressed-tensors scheme")


def _ct_nvfp4(question: Question, scheme: Scheme, _group: _Group) -> Scheme:
    if question.arch >= 100 and question.release != OLD:
        return by_other_kernel(scheme, "flashinfer_cutlass", "SGLang serves NVFP4 experts with flashinfer_cutlass")
    if question.release not in (OLD, NEW):
        return by_other_kernel(scheme, "marlin", "SGLang serves NVFP4 experts weight-only with Marlin on this card")
    return refuse(
        scheme,
        f"SGLang {question.release} stops: NVFP4 experts of compressed-tensors need compute capability 10.0; "
        f"no flag cures it, SGLang {NEWEST} serves them with Marlin",
    )


def _ct_weight_only(question: Question, scheme: Scheme, group: _Group) -> Scheme:
    int4 = group.bits == 4 and group.kind == "int"
    if int4:
        recipe = INT4_GROUP32 if group.group_size == 32 and group.strategy == "group" else "compressed-tensors int4"
        scheme = replace(scheme, label=recipe)
    newest = at_least(question.release, NEWEST)
    restricted = int4 and group.strategy == "group" and group.group_size in (32, 128)
    takes = restricted and group.symmetric and not group.reordered
    if question.runner == "triton" and newest and not takes:
        return refuse(
            scheme,
            "SGLang stops: --moe-runner-backend triton takes symmetric INT4 in groups of 32 or 128 only; leave it out",
        )
    automatic = newest and question.runner == "auto" and question.arch // 10 == 10 and takes
    if release_key(question.release) >= (0, 5, 11) and (question.runner == "triton" or automatic):
        return weight_only_scheme(scheme, group.bits, max(group.group_size, 0), not group.symmetric)
    return by_other_kernel(
        scheme, "marlin", f"SGLang serves {group.bits}-bit weight-only experts with the Marlin kernel"
    )


def _ct_fp8(question: Question, scheme: Scheme, group: _Group) -> Scheme:
    if group.strategy == "block" and question.release == OLD:
        return refuse(scheme, f"SGLang {question.release} stops: it has no block-wise compressed-tensors experts")
    scheme = replace(scheme, number_format=NumberFormat.FP8_W8A8, per_channel=group.strategy == "channel")
    if group.strategy == "block":
        scheme = in_blocks(question, scheme, group.block or (128, 128))
    return scheme if scheme.fate is Fate.LOAD_ERROR else fp8_on(question, scheme)


def _ct_int8(_question: Question, scheme: Scheme, _group: _Group) -> Scheme:
    return refuse(
        scheme,
        "SGLang stops: it has no INT8 W8A8 experts for compressed-tensors; give --quantization w8a8_int8",
    )


def _ct_w4a8(_question: Question, scheme: Scheme, group: _Group) -> Scheme:
    if group.kind == "int" and "pack" in group.format:
        return by_other_kernel(scheme, "cutlass_w4a8", "SGLang serves W4AFP8 experts with a kernel of their own")
    return refuse(scheme, "SGLang stops: it has no W4A8 experts on NVIDIA cards")


def _group(question: Question) -> _Group | None:
    """The config group whose targets cover the experts: by name first, then by class."""
    config = question.quant_config or {}
    groups = [read_mapping(group) for group in list(read_mapping(config.get("config_groups")).values())[:256]]
    names = [name + ".0.gate_proj" for name in question.layers[0]] if question.layers else []
    chosen = next((group for group in groups if _targets(group, names)), None)
    if chosen is None:
        chosen = next((group for group in groups if _targets(group, ["Linear", "FusedMoE"])), None)
    if chosen is None:
        return None
    weights, inputs = read_mapping(chosen.get("weights")), read_mapping(chosen.get("input_activations"))
    if not weights:
        return None
    return _Group(
        bits=read_integer(weights, "num_bits", 8),
        kind=read_text(weights.get("type")) or "int",
        strategy=read_text(weights.get("strategy")) or ("group" if weights.get("group_size") else "tensor"),
        group_size=read_integer(weights, "group_size", -1),
        symmetric=weights.get("symmetric") is not False,
        reordered=bool(weights.get("actorder")),
        input_bits=read_integer(inputs, "num_bits", 8) if inputs else 0,
        input_strategy=read_text(inputs.get("strategy")),
        input_dynamic=bool(inputs.get("dynamic")),
        format=read_text(chosen.get("format")) or read_text(config.get("format")),
        block=read_block_shape(weights, "block_structure"),
    )


def _targets(group: Mapping[str, Any], names: list[str]) -> bool:
    targets = group.get("targets")
    if not isinstance(targets, (list, tuple)):
        return False
    each = [target for target in targets[:MAX_PATTERNS] if isinstance(target, str)]
    return any(matches(target, name, Match.NAME) for target in each for name in names)
