"""From a checkpoint's quantisation, the user's flags and the card: the number format that the MoE kernel sees.

SGLang first settles on one method (`method_of`, model_config.py:1427-1513), whose own code then takes one of several
kernels (`HANDLERS`). Paths in comments are below `srt/layers/quantization/` of 0.5.17.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from fixer.base.errors import ModelError
from fixer.model.rules.families import INT4_GROUP32, KNOWN_RELEASES, MAX_DIMENSION, NEW, NEWEST, NONE, at_least
from fixer.workload import NumberFormat

MAX_IGNORED = 1 << 16
"""Longest list of unquantised modules that is read."""

MAX_PATTERNS = 512
"""Most patterns in such a list that are tried."""

_FP8_ARCH = 89
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


def resolve(question: Question) -> Scheme:
    """The scheme of the experts.

    Raises:
        ModelError: the checkpoint's quantisation makes no sense.
    """
    method, refusal = method_of(question)
    if refusal:
        return Scheme(Fate.LOAD_ERROR, method, reason=refusal, label=method)
    return HANDLERS.get(method, _unknown)(question, replace(_PLAIN, method=method, label=method))


_PLAIN = Scheme(Fate.TRITON, NONE, label=NONE)


# --- which method -----------------------------------------------------------------------------------------------

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

# What 0.4.9 does not have (layers/quantization/__init__.py of 0.4.9).
_NOT_IN_OLD = frozenset(
    {
        "modelopt_fp8",
        "modelopt_mixed",
        "mxfp4",
        "mxfp8",
        "nvfp4_online",
        "quark",
        "quark_mxfp4",
        "auto-round",
        "auto-round-int8",
        "w4afp8",
        "petit_nvfp4",
        "humming",
    }
)


def method_of(question: Question) -> tuple[str, str]:
    """SGLang's name for the quantisation, and why SGLang refuses it ("" where it does not)."""
    config, flag = question.quant_config, question.flag
    flag = _SPELLINGS.get(flag, flag) if flag else flag
    if config is None:
        method = flag or NONE
        return method, _unknown_in(method, question.release)
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
    return method, _unknown_in(method, question.release)


def _unknown_in(method: str, release: str) -> str:
    if method in _NOT_IN_OLD and not at_least(release, NEW):
        return f"SGLang stops: release {release} has no quantisation {method}; use {NEW} or newer"
    return ""


def checkpoint_method(config: Mapping[str, Any]) -> str:
    """The method a checkpoint names; ModelOpt's is worked out from its algorithm (model_config.py:1240-1262)."""
    inner = config.get("quantization")
    body = inner if isinstance(inner, Mapping) else config
    named = _text(config.get("quant_method")).lower()
    if named not in {"", "modelopt"}:
        return _SPELLINGS.get(named, named)
    algorithm = _text(body.get("quant_algo")).upper()
    if algorithm == "MIXED_PRECISION":
        layers = _mapping(body.get("quantized_layers"))
        fp4 = any("NVFP4" in _text(_mapping(layer).get("quant_algo")).upper() for layer in layers.values())
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
        if found == "awq" and _integer(config, "bits", 4) == 4 and arch >= 80:
            return marlin
    if flag == "moe_wna16":
        return flag if _wna16_fits(found, config) else ""
    return found if flag == "marlin" else ""


def _gptq_marlin(config: Mapping[str, Any], arch: int) -> bool:
    """Whether Marlin takes a GPTQ checkpoint (gptq/gptq.py:429-451)."""
    needed = ("bits", "group_size", "sym", "desc_act")
    known = all(config.get(name) is not None for name in needed)
    fits = config.get("bits") in (4, 8) and config.get("sym") is True
    return known and arch >= 80 and fits and config.get("group_size") in (-1, 32, 64, 128)


def _wna16_fits(found: str, config: Mapping[str, Any]) -> bool:
    """Whether `moe_wna16` takes a checkpoint (moe_wna16.py:170-192)."""
    if found == "gptq":
        return not config.get("desc_act") and config.get("bits") in (4, 8)
    return found == "awq" and _integer(config, "bits", 4) == 4


# --- lists of unquantised modules -------------------------------------------------------------------------------


class Match(Enum):
    """How a method compares a list of unquantised modules with a module's name."""

    PATH = "whole dotted parts (utils.py:48-59)"
    SUBSTRING = "anywhere in the name (awq/awq.py:60)"
    NAME = "the whole name, its end, or a re: pattern (compressed_tensors/utils.py:79)"
    WILDCARD = "a shell pattern (modelopt_quant.py)"


_IGNORE_FIELDS: Mapping[Match, tuple[str, ...]] = {
    Match.PATH: ("ignored_layers", "modules_to_not_convert"),
    Match.SUBSTRING: ("modules_to_not_convert",),
    Match.NAME: ("ignore", "exclude", "exclude_layers"),
    Match.WILDCARD: ("exclude_modules", "ignore"),
}


def ignored(config: Mapping[str, Any] | None, match: Match, names: tuple[str, ...]) -> bool:
    """Whether a module, of which `names` are the possible spellings, is left unquantised.

    Raises:
        ModelError: the list is too long or holds something that is no text.
    """
    entries = _ignore_list(config or {}, match)
    patterns = 0
    for entry in entries:
        patterns += entry.startswith("re:") or "*" in entry
        if patterns > MAX_PATTERNS:
            raise ModelError(f"config.json: more than {MAX_PATTERNS} patterns of unquantised modules")
        if any(_matches(entry, name, match) for name in names):
            return True
    return False


def _ignore_list(config: Mapping[str, Any], match: Match) -> tuple[str, ...]:
    for body in (config, _mapping(config.get("quantization"))):
        for field in _IGNORE_FIELDS[match]:
            entries = body.get(field)
            if entries is None:
                continue
            if not isinstance(entries, (list, tuple)) or len(entries) > MAX_IGNORED:
                raise ModelError(f"config.json: {field} of the quantisation is no list of module names")
            if not all(isinstance(entry, str) for entry in entries):
                raise ModelError(f"config.json: {field} of the quantisation holds something that is no text")
            return tuple(entries)
    return ()


def _matches(entry: str, name: str, match: Match) -> bool:
    if not entry:
        return False
    if match is Match.SUBSTRING:
        return entry in name
    if match is Match.WILDCARD:
        return _wildcard(entry, name)
    if match is Match.NAME:
        if entry.startswith("re:"):
            return safe_match(entry[3:], name)
        return entry == name or name.endswith("." + entry)
    bare = entry.rstrip(".").removeprefix("model.")
    # An entry for single experts or projections counts for the fused module (utils.py:115-122).
    return f".{bare}." in f".{name}." or ("experts" in entry and name in f"model.{bare}")


def _wildcard(entry: str, name: str) -> bool:
    """A shell pattern; `fnmatch` turns it into a regular expression, so its stars are bounded."""
    if entry.count("*") > 4 or len(entry) > 256:
        return False
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}." or fnmatchcase(name, entry + ".*")


def safe_match(pattern: str, name: str) -> bool:
    """`re.match` for a pattern out of an untrusted config.json: what could take exponential time matches nothing."""
    repeats = sum(pattern.count(sign) for sign in "*+{")
    if len(pattern) > 256 or len(name) > 256 or repeats > 4 or re.search(r"\)[*+{?]|\\[1-9]", pattern):
        return False
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _skips(question: Question, match: Match, suffix: str = "") -> tuple[bool, tuple[str, ...]]:
    """Whether the experts are left unquantised, and a note where not all layers are alike."""
    each = [ignored(question.quant_config, match, tuple(name + suffix for name in names)) for names in question.layers]
    if not any(each):
        return False, ()
    if all(each):
        return True, ()
    return False, ("some layers' experts are left unquantised; moefix plans for the quantised ones",)


def _unquantized(scheme: Scheme) -> Scheme:
    return replace(
        scheme,
        experts_quantized=False,
        notes=(*scheme.notes, "the checkpoint leaves the experts unquantised"),
    )


# --- one handler a method ---------------------------------------------------------------------------------------


def _refuse(scheme: Scheme, reason: str) -> Scheme:
    return replace(scheme, fate=Fate.LOAD_ERROR, reason=reason)


def _other(scheme: Scheme, kernel: str, reason: str) -> Scheme:
    return replace(scheme, fate=Fate.OTHER, kernel=kernel, reason=reason)


def _needs(scheme: Scheme, question: Question, least: int) -> Scheme | None:
    """A refusal where the card is older than the method allows."""
    if question.arch >= least:
        return None
    return _refuse(
        scheme,
        f"SGLang stops: {scheme.method} needs compute capability {least // 10}.{least % 10}, this card has "
        f"{question.arch // 10}.{question.arch % 10}; {_FP8_REMEDY}",
    )


def _plain(_question: Question, scheme: Scheme) -> Scheme:
    """Unquantised, or unpacked to bf16 before the kernel runs."""
    return scheme


def _fp8_on(question: Question, scheme: Scheme) -> Scheme:
    """FP8 experts: refused below 8.0, asked for and not compilable below 8.9."""
    refused = _needs(scheme, question, 80)
    if refused or question.arch >= _FP8_ARCH:
        return refused or scheme
    online = question.quant_config is None
    cure = "leave --quantization fp8 out" if online else f"no SGLang flag cures it, {_FP8_REMEDY}"
    return replace(
        scheme,
        fate=Fate.CRASH,
        reason=f"SGLang asks for a file, and then Triton fails: fp8e4nv needs compute capability 8.9, this card has "
        f"{question.arch // 10}.{question.arch % 10}; {cure}",
    )


def _in_blocks(question: Question, scheme: Scheme, block: tuple[int, int]) -> Scheme:
    """Block-wise scales, refused where the shard is no whole number of blocks (fp8.py:1135-1148)."""
    rows, columns = block
    for edge, which in ((rows, "block_n"), (columns, "block_k")):
        if question.width % edge and (which == "block_n" or question.tp_size > 1):
            return _refuse(
                scheme,
                f"SGLang stops: the experts' shard is {question.width} wide, not divisible by the scales' "
                f"{which} = {edge}; {question.rescue(edge)}",
            )
    return replace(scheme, block_shape=block)


def _fp8(question: Question, scheme: Scheme) -> Scheme:
    skipped, notes = _skips(question, Match.PATH)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return _needs(scheme, question, 80) or _unquantized(scheme)
    scheme = replace(scheme, number_format=NumberFormat.FP8_W8A8)
    block = _block_shape(question.quant_config, "weight_block_size")
    if block is not None:
        scheme = _in_blocks(question, scheme, block)
    return scheme if scheme.fate is Fate.LOAD_ERROR else _fp8_on(question, scheme)


def _mxfp8(question: Question, scheme: Scheme) -> Scheme:
    refused = _needs(scheme, question, 100)  # fp8.py:298
    return refused or _other(scheme, "flashinfer_trtllm", "SGLang serves MXFP8 experts with FlashInfer's kernel")


def _blockwise_int8(question: Question, scheme: Scheme) -> Scheme:
    scheme = replace(scheme, number_format=NumberFormat.INT8_W8A8)
    return _in_blocks(question, scheme, _block_shape(question.quant_config, "weight_block_size") or (128, 128))


def _w8a8_fp8(question: Question, scheme: Scheme) -> Scheme:
    refused = _needs(scheme, question, _FP8_ARCH)
    return refused or replace(scheme, number_format=NumberFormat.FP8_W8A8, per_channel=True)


def _w8a8_int8(question: Question, scheme: Scheme) -> Scheme:
    skipped, notes = _skips(question, Match.NAME)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return _unquantized(scheme)
    if question.quant_config is None:
        scheme = replace(scheme, notes=(*notes, "the checkpoint must hold INT8 weights, but its config names none"))
    return replace(scheme, number_format=NumberFormat.INT8_W8A8, per_channel=True)


def _modelopt_fp8(question: Question, scheme: Scheme) -> Scheme:
    refused = _needs(scheme, question, _FP8_ARCH)  # modelopt_quant.py:421
    skipped, notes = _skips(question, Match.WILDCARD)
    scheme = replace(scheme, notes=notes)
    if refused or skipped:
        return refused or _unquantized(scheme)
    return replace(scheme, number_format=NumberFormat.FP8_W8A8)


def _nvfp4(question: Question, scheme: Scheme) -> Scheme:
    """ModelOpt's NVFP4 (modelopt_quant.py:1962,2526-2532; arg_groups/overrides.py:2367-2376)."""
    if not at_least(question.release, NEW):
        kernel = "cutlass_moe_fp4"
        return _needs(scheme, question, 100) or _other(scheme, kernel, f"SGLang serves NVFP4 experts with {kernel}")
    refused = _needs(scheme, question, 80)
    skipped, notes = _skips(question, Match.WILDCARD)
    if refused or skipped:
        return refused or _unquantized(replace(scheme, notes=notes))
    major = question.arch // 10
    by_flag = "flashinfer_cutlass" if question.flag == "modelopt_fp4" else "flashinfer_trtllm"
    kernel = "marlin" if major < 10 else by_flag if major == 12 else "flashinfer_trtllm"
    return _other(scheme, kernel, f"SGLang serves NVFP4 experts with {kernel} on this card")


def _nvfp4_online(question: Question, scheme: Scheme) -> Scheme:
    if question.arch // 10 != 10:
        return _refuse(scheme, "SGLang stops: --quantization nvfp4_online needs an SM100 card; leave it out")
    return _other(scheme, "flashinfer_trtllm", "SGLang serves NVFP4 experts with flashinfer_trtllm")


def _awq(question: Question, scheme: Scheme) -> Scheme:
    """AWQ for Marlin, or the Triton kernel where Marlin cannot take the shard (awq/awq.py:327-365)."""
    skipped, notes = _skips(question, Match.SUBSTRING)
    scheme = replace(scheme, notes=notes)
    if skipped:
        return _unquantized(scheme)
    config = question.quant_config or {}
    group = _integer(config, "group_size", 128)
    if _marlin_takes(question, group):
        if question.runner != "auto" and at_least(question.release, NEW):  # awq/schemes/awq_moe.py:132
            return _refuse(scheme, "SGLang stops: AWQ experts want --moe-runner-backend auto; leave it out")
        return _other(scheme, "marlin", "SGLang serves AWQ experts with the Marlin kernel")
    return _wna16(question, scheme)


def _marlin_takes(question: Question, group: int) -> bool:
    """marlin_utils.py:266-284"""
    shape = question.hidden % 128 == 0 and question.width % max(64, group) == 0
    return shape and group in (-1, 32, 64, 128)


def _wna16(question: Question, scheme: Scheme) -> Scheme:
    """Weight-only integers in the Triton kernel; the group is halved until it divides both sizes (moe_wna16.py:240)."""
    config = question.quant_config or {}
    bits = _integer(config, "bits", 4)
    group = _integer(config, "group_size", 128)
    zero_points = not config.get("sym", True) if "sym" in config else bool(config.get("zero_point"))
    if bits not in (4, 8):
        return _refuse(scheme, f"SGLang stops: its weight-only kernel takes 4 and 8 bits, not {bits}")
    while group > 0 and (question.width % group or question.hidden % group):
        group //= 2
        if group < 32:
            return _refuse(
                scheme,
                f"SGLang stops: no group of 32 or more weights divides {question.width} and {question.hidden}; "
                f"{question.rescue(32)}",
            )
    return _weight_only(scheme, bits, max(group, 0), zero_points)


def _weight_only(scheme: Scheme, bits: int, group: int, zero_points: bool) -> Scheme:
    packed = bits == 4
    return replace(
        scheme,
        number_format=NumberFormat.INT4_W4A16 if packed else NumberFormat.INT8_W8A16,
        group_size=group,
        has_zero_points=zero_points,
        packed=packed,
    )


def _moe_wna16(question: Question, scheme: Scheme) -> Scheme:
    if question.quant_config is None:
        return _refuse(scheme, "SGLang stops: --quantization moe_wna16 needs an AWQ or GPTQ checkpoint; leave it out")
    if checkpoint_method(question.quant_config) == "awq" and _skips(question, Match.SUBSTRING)[0]:
        return _unquantized(scheme)
    return _wna16(question, scheme)


def _gptq_marlin_handler(_question: Question, scheme: Scheme) -> Scheme:
    return _other(scheme, "marlin", "SGLang serves GPTQ experts with the Marlin kernel")


def _gptq(question: Question, scheme: Scheme) -> Scheme:
    """The plain method has no MoE (gptq/gptq.py:173-178)."""
    fits = question.quant_config is not None and _wna16_fits("gptq", question.quant_config)
    cure = "give --quantization moe_wna16" if fits else "use another checkpoint"
    if question.flag == "gptq":
        cure = "leave --quantization gptq out"
    return _refuse(scheme, f"SGLang stops: its plain GPTQ method serves no experts; {cure}")


def _plain_awq(question: Question, scheme: Scheme) -> Scheme:
    cure = "leave --quantization awq out" if question.flag == "awq" else "give --quantization moe_wna16"
    return _refuse(scheme, f"SGLang stops: its plain AWQ method serves no experts; {cure}")


def _auto_round(question: Question, scheme: Scheme) -> Scheme:
    """Intel's format; 0.5.17 has the two branches the wrong way round (auto_round.py:398-412)."""
    config = question.quant_config or {}
    bits, group = _integer(config, "bits", 4), _integer(config, "group_size", 128)
    symmetric = bool(config.get("sym", True))
    packing = _text(config.get("packing_format")) + _text(config.get("backend"))
    marlin = bits in (4, 8) and symmetric and _marlin_takes(question, group) and question.arch >= 80
    if "awq" in packing:
        marlin = bits == 4 and _marlin_takes(question, group) and question.arch >= 80
        to_triton = not marlin
    else:
        to_triton = marlin if not at_least(question.release, NEWEST) else not marlin
    if not to_triton:
        return _other(scheme, "marlin", "SGLang serves AutoRound experts with the Marlin kernel")
    return _wna16(question, scheme)


def _mxfp4(_question: Question, scheme: Scheme) -> Scheme:
    """Unpacked to bf16 for the Triton kernel, N padded (mxfp4.py:458-461,987-1007); runner rules come first."""
    return replace(scheme, pad_to=64, notes=("SGLang unpacks MXFP4 experts to bfloat16 for this kernel",))


def _quark(question: Question, scheme: Scheme) -> Scheme:
    if _skips(question, Match.NAME)[0]:
        return _unquantized(scheme)
    weight = _mapping(_mapping(_mapping(question.quant_config).get("global_quant_config")).get("weight"))
    if "fp8" not in _text(weight.get("dtype")):
        return replace(
            scheme,
            fate=Fate.UNCERTAIN,
            reason="Quark experts in this format are made for AMD cards; moefix does not know what SGLang does here",
        )
    scheme = replace(
        scheme,
        number_format=NumberFormat.FP8_W8A8,
        per_channel="channel" in _text(weight.get("qscheme")),
    )
    return _fp8_on(question, scheme)


def _own_kernel(kernel: str, what: str) -> Handler:
    def handler(_question: Question, scheme: Scheme) -> Scheme:
        return _other(scheme, kernel, f"SGLang serves {what} experts with a kernel of their own")

    return handler


def _no_method(_question: Question, scheme: Scheme) -> Scheme:
    return _refuse(scheme, f"SGLang stops: it has no quantisation {scheme.method} for experts")


# Choices of --quantization without a handler here: for other makers' chips, or 0.4.9's.
_NOT_HANDLED = frozenset({"marlin", "modelslim", "mxfp_w4a8", "mlx_q4", "mlx_q8", "qoq"})


def _unknown(question: Question, scheme: Scheme) -> Scheme:
    shown = scheme.method[:40]
    if question.release in KNOWN_RELEASES and question.flag == scheme.method and shown not in _NOT_HANDLED:
        return _refuse(scheme, f"SGLang stops: it knows no --quantization {shown}; leave it out")
    return replace(
        scheme,
        fate=Fate.UNCERTAIN,
        method=shown,
        label=shown,
        reason=f"moefix does not know the quantisation {shown!r}; worked out as if the experts were unquantised",
    )


# --- compressed-tensors -----------------------------------------------------------------------------------------


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


def _compressed_tensors(question: Question, scheme: Scheme) -> Scheme:
    """compressed_tensors.py:get_moe_scheme"""
    skipped, notes = _skips(question, Match.NAME, ".0.gate_proj")
    scheme = replace(scheme, notes=notes)
    if skipped:
        return _unquantized(scheme)
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
    return _refuse(scheme, "SGLang stops: it has no MoE kernel for this compressed-tensors scheme")


def _ct_nvfp4(question: Question, scheme: Scheme, _group: _Group) -> Scheme:
    if question.arch >= 100 and at_least(question.release, NEW):
        return _other(scheme, "flashinfer_cutlass", "SGLang serves NVFP4 experts with flashinfer_cutlass")
    if at_least(question.release, NEWEST):
        return _other(scheme, "marlin", "SGLang serves NVFP4 experts weight-only with Marlin on this card")
    return _refuse(
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
        return _refuse(
            scheme,
            "SGLang stops: --moe-runner-backend triton takes symmetric INT4 in groups of 32 or 128 only; leave it out",
        )
    automatic = newest and question.runner == "auto" and question.arch // 10 == 10 and takes
    if at_least(question.release, NEW) and (question.runner == "triton" or automatic):
        return _weight_only(scheme, group.bits, max(group.group_size, 0), not group.symmetric)
    return _other(scheme, "marlin", f"SGLang serves {group.bits}-bit weight-only experts with the Marlin kernel")


def _ct_fp8(question: Question, scheme: Scheme, group: _Group) -> Scheme:
    if group.strategy == "block" and not at_least(question.release, NEW):
        return _refuse(scheme, f"SGLang {question.release} stops: it has no block-wise compressed-tensors experts")
    scheme = replace(scheme, number_format=NumberFormat.FP8_W8A8, per_channel=group.strategy == "channel")
    if group.strategy == "block":
        scheme = _in_blocks(question, scheme, group.block or (128, 128))
    return scheme if scheme.fate is Fate.LOAD_ERROR else _fp8_on(question, scheme)


def _ct_int8(_question: Question, scheme: Scheme, _group: _Group) -> Scheme:
    return _refuse(
        scheme,
        "SGLang stops: it has no INT8 W8A8 experts for compressed-tensors; give --quantization w8a8_int8",
    )


def _ct_w4a8(_question: Question, scheme: Scheme, group: _Group) -> Scheme:
    if group.kind == "int" and "pack" in group.format:
        return _other(scheme, "cutlass_w4a8", "SGLang serves W4AFP8 experts with a kernel of their own")
    return _refuse(scheme, "SGLang stops: it has no W4A8 experts on NVIDIA cards")


def _group(question: Question) -> _Group | None:
    """The config group whose targets cover the experts: by name first, then by class."""
    config = question.quant_config or {}
    groups = [_mapping(group) for group in list(_mapping(config.get("config_groups")).values())[:256]]
    names = [name + ".0.gate_proj" for name in question.layers[0]] if question.layers else []
    chosen = next((group for group in groups if _targets(group, names)), None)
    if chosen is None:
        chosen = next((group for group in groups if _targets(group, ["Linear", "FusedMoE"])), None)
    if chosen is None:
        return None
    weights, inputs = _mapping(chosen.get("weights")), _mapping(chosen.get("input_activations"))
    if not weights:
        return None
    return _Group(
        bits=_integer(weights, "num_bits", 8),
        kind=_text(weights.get("type")) or "int",
        strategy=_text(weights.get("strategy")) or ("group" if weights.get("group_size") else "tensor"),
        group_size=_integer(weights, "group_size", -1),
        symmetric=weights.get("symmetric") is not False,
        reordered=bool(weights.get("actorder")),
        input_bits=_integer(inputs, "num_bits", 8) if inputs else 0,
        input_strategy=_text(inputs.get("strategy")),
        input_dynamic=bool(inputs.get("dynamic")),
        format=_text(chosen.get("format")) or _text(config.get("format")),
        block=_block_shape(weights, "block_structure"),
    )


def _targets(group: Mapping[str, Any], names: list[str]) -> bool:
    targets = group.get("targets")
    if not isinstance(targets, (list, tuple)):
        return False
    each = [target for target in targets[:MAX_PATTERNS] if isinstance(target, str)]
    return any(_matches(target, name, Match.NAME) for target in each for name in names)


# --- reading untrusted values -----------------------------------------------------------------------------------


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _integer(config: Mapping[str, Any], name: str, default: int) -> int:
    """A small whole number of the quantisation, -1 included.

    Raises:
        ModelError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MAX_DIMENSION:
        raise ModelError(f"config.json: {name} of the quantisation is no sensible whole number")
    return value


def _block_shape(config: Mapping[str, Any] | None, name: str) -> tuple[int, int] | None:
    """(block_n, block_k) of block-wise scales, None where there are none.

    Raises:
        ModelError: it is no pair of whole numbers.
    """
    value = (config or {}).get(name)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", value):
        value = [int(edge) for edge in value.split("x")]
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) and 0 < edge <= 65536 for edge in pair)
    if len(pair) != 2 or not whole:
        raise ModelError(f"config.json: {name} of the quantisation is no pair of whole numbers")
    return pair[0], pair[1]


Handler = Callable[[Question, Scheme], Scheme]

HANDLERS: Mapping[str, Handler] = {
    NONE: _plain,
    "fp8": _fp8,
    "mxfp8": _mxfp8,
    "blockwise_int8": _blockwise_int8,
    "w8a8_fp8": _w8a8_fp8,
    "w8a8_int8": _w8a8_int8,
    "auto-round-int8": _w8a8_int8,
    "compressed-tensors": _compressed_tensors,
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
