"""From a checkpoint's quantisation, the user's flags and the card: the number format that the MoE kernel sees.

SGLang first settles on one method (`method_of`, model_config.py:1427-1513), whose own code then takes one of several
kernels (`HANDLERS`). Paths in comments are below `srt/layers/quantization/` of 0.5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fixer.model.rules.compressed_tensors import compressed_tensors_scheme
from fixer.model.rules.family import NONE
from fixer.model.rules.ignored import Match, skips
from fixer.model.rules.methods import checkpoint_method, method_of, wna16_fits
from fixer.model.rules.scheme import (
    FP8_ARCH,
    PLAIN,
    Fate,
    Handler,
    Question,
    Scheme,
    by_other_kernel,
    fp8_on,
    in_blocks,
    needs_capability,
    refuse,
    unquantized,
    weight_only_scheme,
)
from fixer.model.rules.values import read_block_shape, read_integer, read_mapping, read_text
from fixer.sglang.releases import NEW, at_least, release_key
from fixer.workload import NumberFormat


def resolve(question: Question) -> Scheme:
    """The scheme of the experts.

    Raises:
        ModelError: the checkpoint's quantisation makes no sense.
    """
    method, refusal = method_of(question)
    if refusal:
        return Scheme(Fate.LOAD_ERROR, method, reason=refusal, label=method)
    return HANDLERS.get(method, _unknown)(question, replace(PLAIN, method=method, label=method))


# --- which method -----------------------------------------------------------------------------------------------


# --- lists of unquantised modules -------------------------------------------------------------------------------


# --- one handler a method ---------------------------------------------------------------------------------------


def _plain(_question: Question, scheme: Scheme) -> Scheme:
    """Unquantised, or unpacked to bf16 before the kernel runs."""
    return scheme


def _fp8(question: Question, scheme: Scheme) -> Scheme:
    skipped, notes = skips(question, Match.PATH)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return needs_capability(scheme, question, 80) or unquantized(scheme)
    scheme = replace(scheme, number_format=NumberFormat.FP8_W8A8)
    block = read_block_shape(question.quant_config, "weight_block_size")
    if block is not None:
        scheme = in_blocks(question, scheme, block)
    return scheme if scheme.fate is Fate.LOAD_ERROR else fp8_on(question, scheme)


def _mxfp8(question: Question, scheme: Scheme) -> Scheme:
    refused = needs_capability(scheme, question, 100)  # fp8.py:298
    return refused or by_other_kernel(
        scheme, "flashinfer_trtllm", "SGLang serves MXFP8 experts with FlashInfer's kernel"
    )


def _blockwise_int8(question: Question, scheme: Scheme) -> Scheme:
    scheme = replace(scheme, number_format=NumberFormat.INT8_W8A8)
    return in_blocks(question, scheme, read_block_shape(question.quant_config, "weight_block_size") or (128, 128))


def _w8a8_fp8(question: Question, scheme: Scheme) -> Scheme:
    refused = needs_capability(scheme, question, FP8_ARCH)
    return refused or replace(scheme, number_format=NumberFormat.FP8_W8A8, per_channel=True)


def _w8a8_int8(question: Question, scheme: Scheme) -> Scheme:
    skipped, notes = skips(question, Match.NAME)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return unquantized(scheme)
    if question.quant_config is None:
        scheme = replace(scheme, notes=(*notes, "the checkpoint must hold INT8 weights, but its config names none"))
    return replace(scheme, number_format=NumberFormat.INT8_W8A8, per_channel=True)


def _modelopt_fp8(question: Question, scheme: Scheme) -> Scheme:
    refused = needs_capability(scheme, question, FP8_ARCH)  # modelopt_quant.py:421
    skipped, notes = skips(question, Match.WILDCARD)
    scheme = replace(scheme, notes=notes)
    if refused or skipped:
        return refused or unquantized(scheme)
    return replace(scheme, number_format=NumberFormat.FP8_W8A8)


def _nvfp4(question: Question, scheme: Scheme) -> Scheme:
    """ModelOpt's NVFP4 (modelopt_quant.py:1962,2526-2532; arg_groups/overrides.py:2367-2376)."""
    if not at_least(question.release, NEW):
        kernel = "cutlass_moe_fp4"
        return needs_capability(scheme, question, 100) or by_other_kernel(
            scheme, kernel, f"SGLang serves NVFP4 experts with {kernel}"
        )
    refused = needs_capability(scheme, question, 80)
    skipped, notes = skips(question, Match.WILDCARD)
    if refused or skipped:
        return refused or unquantized(replace(scheme, notes=notes))
    major = question.arch // 10
    by_flag = "flashinfer_cutlass" if question.flag == "modelopt_fp4" else "flashinfer_trtllm"
    kernel = "marlin" if major < 10 else by_flag if major == 12 else "flashinfer_trtllm"
    return by_other_kernel(scheme, kernel, f"SGLang serves NVFP4 experts with {kernel} on this card")


def _nvfp4_online(question: Question, scheme: Scheme) -> Scheme:
    if question.arch // 10 != 10:
        return refuse(scheme, "SGLang stops: --quantization nvfp4_online needs an SM100 card; leave it out")
    return by_other_kernel(scheme, "flashinfer_trtllm", "SGLang serves NVFP4 experts with flashinfer_trtllm")


def _awq(question: Question, scheme: Scheme) -> Scheme:
    """AWQ for Marlin, or the Triton kernel where Marlin cannot take the shard (awq/awq.py:327-365)."""
    skipped, notes = skips(question, Match.SUBSTRING)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return unquantized(scheme)
    config = question.quant_config or {}
    group = read_integer(config, "group_size", 128)
    if _marlin_takes(question, group):
        if question.runner != "auto" and at_least(question.release, NEW):  # awq/schemes/awq_moe.py:132
            return refuse(scheme, "SGLang stops: AWQ experts want --moe-runner-backend auto; leave it out")
        return by_other_kernel(scheme, "marlin", "SGLang serves AWQ experts with the Marlin kernel")
    return _wna16(question, scheme)


def _marlin_takes(question: Question, group: int) -> bool:
    """marlin_utils.py:266-284"""
    shape = question.hidden % 128 == 0 and question.width % max(64, group) == 0
    return shape and group in (-1, 32, 64, 128)


def _wna16(question: Question, scheme: Scheme) -> Scheme:
    """Weight-only integers in the Triton kernel; the group is halved until it divides both sizes (moe_wna16.py:240)."""
    config = question.quant_config or {}
    bits = read_integer(config, "bits", 4)
    group = read_integer(config, "group_size", 128)
    zero_points = not config.get("sym", True) if "sym" in config else bool(config.get("zero_point"))
    if bits not in (4, 8):
        return refuse(scheme, f"SGLang stops: its weight-only kernel takes 4 and 8 bits, not {bits}")
    while group > 0 and (question.width % group or question.hidden % group):
        group //= 2
        if group < 32:
            return refuse(
                scheme,
                f"SGLang stops: no group of 32 or more weights divides {question.width} and {question.hidden}; "
                f"{question.rescue(32)}",
            )
    return weight_only_scheme(scheme, bits, max(group, 0), zero_points)


def _moe_wna16(question: Question, scheme: Scheme) -> Scheme:
    if question.quant_config is None:
        return refuse(scheme, "SGLang stops: --quantization moe_wna16 needs an AWQ or GPTQ checkpoint; leave it out")
    if checkpoint_method(question.quant_config) == "awq" and skips(question, Match.SUBSTRING)[0]:
        return unquantized(scheme)
    return _wna16(question, scheme)


def _gptq_marlin_handler(_question: Question, scheme: Scheme) -> Scheme:
    return by_other_kernel(scheme, "marlin", "SGLang serves GPTQ experts with the Marlin kernel")


def _gptq(question: Question, scheme: Scheme) -> Scheme:
    """The plain method has no MoE (gptq/gptq.py:173-178)."""
    fits = question.quant_config is not None and wna16_fits("gptq", question.quant_config)
    cure = "give --quantization moe_wna16" if fits else "use another checkpoint"
    if question.flag == "gptq":
        cure = "leave --quantization gptq out"
    return refuse(scheme, f"SGLang stops: its plain GPTQ method serves no experts; {cure}")


def _plain_awq(question: Question, scheme: Scheme) -> Scheme:
    cure = "leave --quantization awq out" if question.flag == "awq" else "give --quantization moe_wna16"
    return refuse(scheme, f"SGLang stops: its plain AWQ method serves no experts; {cure}")


def _auto_round(question: Question, scheme: Scheme) -> Scheme:
    """Intel's format; 0.5.17 has the two branches the wrong way round (auto_round.py:398-412)."""
    config = question.quant_config or {}
    bits, group = read_integer(config, "bits", 4), read_integer(config, "group_size", 128)
    symmetric = bool(config.get("sym", True))
    packing = read_text(config.get("packing_format")) + read_text(config.get("backend"))
    marlin = bits in (4, 8) and symmetric and _marlin_takes(question, group) and question.arch >= 80
    if "awq" in packing:
        marlin = bits == 4 and _marlin_takes(question, group) and question.arch >= 80
        to_triton = not marlin
    else:
        to_triton = not marlin if release_key(question.release) >= (0, 5, 18) else marlin
    if not to_triton:
        return by_other_kernel(scheme, "marlin", "SGLang serves AutoRound experts with the Marlin kernel")
    return _wna16(question, scheme)


def _mxfp4(_question: Question, scheme: Scheme) -> Scheme:
    """Unpacked to bf16 for the Triton kernel, N padded (mxfp4.py:458-461,987-1007); runner rules come first."""
    return replace(scheme, pad_to=64, notes=("SGLang unpacks MXFP4 experts to bfloat16 for this kernel",))


def _quark(question: Question, scheme: Scheme) -> Scheme:
    if skips(question, Match.NAME)[0]:
        return unquantized(scheme)
    weight = read_mapping(read_mapping(read_mapping(question.quant_config).get("global_quant_config")).get("weight"))
    if "fp8" not in read_text(weight.get("dtype")):
        return replace(
            scheme,
            fate=Fate.UNCERTAIN,
            reason="Quark experts in this format are made for AMD cards; moefix does not know what SGLang does here",
        )
    scheme = replace(
        scheme,
        number_format=NumberFormat.FP8_W8A8,
        per_channel="channel" in read_text(weight.get("qscheme")),
    )
    return fp8_on(question, scheme)


def _own_kernel(kernel: str, what: str) -> Handler:
    def handler(_question: Question, scheme: Scheme) -> Scheme:
        return by_other_kernel(scheme, kernel, f"SGLang serves {what} experts with a kernel of their own")

    return handler


def _no_method(_question: Question, scheme: Scheme) -> Scheme:
    return refuse(scheme, f"SGLang stops: it has no quantisation {scheme.method} for experts")


def _unknown(_question: Question, scheme: Scheme) -> Scheme:
    shown = scheme.method[:40]
    return replace(
        scheme,
        fate=Fate.UNCERTAIN,
        method=shown,
        label=shown,
        reason=f"moefix does not know the quantisation {shown!r}; worked out as if the experts were unquantised",
    )


# --- reading untrusted values -----------------------------------------------------------------------------------


HANDLERS: Mapping[str, Handler] = {
    NONE: _plain,
    "fp8": _fp8,
    "mxfp8": _mxfp8,
    "blockwise_int8": _blockwise_int8,
    "w8a8_fp8": _w8a8_fp8,
    "w8a8_int8": _w8a8_int8,
    "auto-round-int8": _w8a8_int8,
    "compressed-tensors": compressed_tensors_scheme,
    "modelopt": _modelopt_fp8,
    "modelopt_fp8": _modelopt_fp8,
    "modelopt_fp4": _nvfp4,
    "modelopt_mixed": _nvfp4,
    "nvfp4_online": _nvfp4_online,
    "awq": _plain_awq,
    "awq_marlin": _awq,
    "gptq": _gptq,
    "gptq_marlin": _gptq_marlin_handler,
    "moe_wna16": _moe_wna16,
    "auto-round": _auto_round,
    "bitsandbytes": _plain,
    "mxfp4": _mxfp4,
    "quark": _quark,
    "gguf": _own_kernel("gguf", "GGUF"),
    "w4afp8": _own_kernel("cutlass_w4a8", "W4AFP8"),
    "humming": _own_kernel("humming", "Humming"),
    "experts_int8": _no_method,
    "quark_mxfp4": _no_method,
    "quark_int4fp8_moe": _no_method,
    "petit_nvfp4": _no_method,
}
"""SGLang's methods; one that is not here is uncertain."""
