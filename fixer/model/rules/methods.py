"""Which quantisation method SGLang takes for a checkpoint and its flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fixer.model.rules.family import NONE
from fixer.model.rules.scheme import Question
from fixer.model.rules.values import read_integer, read_mapping, read_text

_SPELLINGS: Mapping[str, str] = {"compressed_tensors": "compressed-tensors", "auto_round": "auto-round"}


# --quantization X is taken for a checkpoint of method Y (model_config.py:1416-1430).
_COMPATIBLE: Mapping[str, frozenset[str]] = {
    "modelopt_fp8": frozenset({"modelopt"}),
    "modelopt_fp4": frozenset({"modelopt"}),
    "modelopt_mixed": frozenset({"modelopt"}),
    "modelopt": frozenset({"modelopt_fp8", "modelopt_fp4", "modelopt_mixed"}),
    "nvfp4_online": frozenset({"fp8"}),
    "petit_nvfp4": frozenset({"modelopt"}),
    "w8a8_int8": frozenset({"compressed-tensors"}),
    "w8a8_fp8": frozenset({"compressed-tensors"}),
    "auto-round-int8": frozenset({"compressed-tensors"}),
    "quark_mxfp4": frozenset({"fp8", "quark"}),
}


def method_of(question: Question) -> tuple[str, str]:
    """SGLang's name for the quantisation, and why SGLang refuses it ("" where it does not)."""
    config, flag = question.quant_config, question.flag
    flag = _SPELLINGS.get(flag, flag) if flag else flag
    if config is None:
        method = flag or NONE
        return method, unknown_to(method, question)
    found = checkpoint_method(config)
    method = _converted(found, flag, config, question.arch) or flag or found
    compatible = (
        method == found
        or found in _COMPATIBLE.get(method, frozenset())
        or (method in _CONVERSIONS and found in _CONVERSIONS[method])
    )
    if not compatible:
        return method, (
            f"SGLang stops: the checkpoint is quantised with {found}, --quantization says {flag}; "
            "leave --quantization out"
        )
    if method == "modelopt":
        method = found
    return method, unknown_to(method, question)


def checkpoint_method(config: Mapping[str, Any]) -> str:
    """The method a checkpoint names; ModelOpt's is worked out from its algorithm (model_config.py:1240-1262)."""
    inner = config.get("quantization")
    body = inner if isinstance(inner, Mapping) else config
    named = read_text(config.get("quant_method")).lower()
    if named not in {"", "modelopt"}:
        return _SPELLINGS.get(named, named)
    algorithm = read_text(body.get("quant_algo")).upper()
    if algorithm == "MIXED_PRECISION":
        layers = read_mapping(body.get("quantized_layers"))
        fp4 = any("NVFP4" in read_text(read_mapping(layer).get("quant_algo")).upper() for layer in layers.values())
        return "modelopt_mixed" if fp4 else "w4afp8"
    for part, method in (("FP4", "modelopt_fp4"), ("FP8", "modelopt_fp8")):
        if part in algorithm:
            return method
    return named or "quantized"


_CONVERSIONS: Mapping[str, frozenset[str]] = {
    "awq_marlin": frozenset({"awq"}),
    "gptq_marlin": frozenset({"gptq"}),
    "moe_wna16": frozenset({"awq", "gptq"}),
}


def _converted(found: str, flag: str | None, config: Mapping[str, Any], arch: int) -> str:
    """The method that SGLang converts a checkpoint to at load, "" for none."""
    marlin = f"{found}_marlin"
    if flag in {None, "marlin", marlin}:
        if found == "gptq" and _gptq_marlin(config, arch):
            return marlin
        if found == "awq" and read_integer(config, "bits", 4) == 4 and arch >= 80:
            return marlin
    if flag == "moe_wna16":
        return flag if wna16_fits(found, config) else ""
    return found if flag == "marlin" else ""


def _gptq_marlin(config: Mapping[str, Any], arch: int) -> bool:
    """Whether Marlin takes a GPTQ checkpoint (gptq/gptq.py:429-451)."""
    needed = ("bits", "group_size", "sym", "desc_act")
    known = all(config.get(name) is not None for name in needed)
    fits = config.get("bits") in (4, 8) and config.get("sym") is True
    return known and arch >= 80 and fits and config.get("group_size") in (-1, 32, 64, 128)


def wna16_fits(found: str, config: Mapping[str, Any]) -> bool:
    """Whether `moe_wna16` takes a checkpoint (moe_wna16.py:170-192)."""
    if found == "gptq":
        return not config.get("desc_act") and config.get("bits") in (4, 8)
    return found == "awq" and read_integer(config, "bits", 4) == 4


def unknown_to(method: str, question: Question) -> str:
    """Why SGLang refuses a method that its tree does not have, "" where it has it or the tree cannot be read."""
    if not question.methods or method in (NONE, *question.methods):
        return ""
    return f"SGLang stops: {question.release} has no quantisation {method}; use a release or a checkpoint that does"
