"""What matters of the user's SGLang flags to the MoE kernel and to the download.

moefix passes the user's words on untouched; here they are only read, as SGLang reads them (`fixer.sglang.parser`), by
the flags that the tree declares. Where no tree can be read, the flags of `ServerFlags` are all that is known, and any
other passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NoReturn

from fixer.base.errors import UsageError
from fixer.sglang.config_file import CONFIG
from fixer.sglang.declared import Declared
from fixer.sglang.flag import Flag
from fixer.sglang.parser import Given, UnknownFlagError, check_words, has_plugins, nearest, read_words, shortened

MAX_INTEGER = 2**31 - 1
"""No count on SGLang's command line is sensibly larger."""

MAX_JSON_DEPTH = 32
"""Nesting limit of `--json-model-override-args`."""


# --- how a value is read: ValueError says what it must be ------------------------------------------------------------


def _number(least: int, *others: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on, or one of `others`; also 8k, 8Ki and the like (utils/common.py:2917)."""
    wanted = f"a whole number from {least}" + "".join(f", or {other}" for other in others)

    def read(text: str) -> int:
        match = re.fullmatch(r"(-?[0-9]{1,10})(Ki|Mi|k|M)?", text.strip())
        scale = {"k": 10**3, "M": 10**6, "Ki": 2**10, "Mi": 2**20}.get(match[2] or "", 1) if match else 1
        number = int(match[1]) * scale if match else least - 1
        if match is None or (number not in others and not least <= number <= MAX_INTEGER):
            raise ValueError(f"must be {wanted}")
        return number

    return read


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _lower(text: str) -> str:
    """SGLang compares these in lower case (model_config.py:1427, load_config.py:103)."""
    return _text(text).lower()


_DTYPES = {"half": "float16", "float": "float32", **{name: name for name in ("auto", "float16", "bfloat16", "float32")}}


def _dtype(text: str) -> str:
    if text.lower() not in _DTYPES:
        raise ValueError(f"must be one of {', '.join(_DTYPES)}")
    return _DTYPES[text.lower()]


def _object(text: str) -> Mapping[str, Any]:
    """A JSON object of bounded nesting."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or json_depth(value) > MAX_JSON_DEPTH:
        raise ValueError(f"must be a JSON object such as '{{\"num_experts\": 64}}', at most {MAX_JSON_DEPTH} deep")
    return MappingProxyType(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def json_depth(value: Any) -> int:
    """How deep lists and objects are nested in a parsed JSON value; 0 for a plain value. Never recurses."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


_COUNT, _NATURAL, _SIZE = _number(1), _number(0), _number(1, -1)


# --- the flags -------------------------------------------------------------------------------------------------------


def _flag(default: Any, read: Callable[[str], Any], *others: str, nargs: str | None = None) -> Any:
    """A field that a flag with a value sets: how the value is read, and other spellings than --the-field."""
    return field(default=default, metadata={"read": read, "others": others, "nargs": nargs})


def _switch(*others: str) -> Any:
    """A field that a flag without a value sets."""
    return field(default=False, metadata={"read": None, "others": others, "nargs": None})


@dataclass(frozen=True)
class ServerFlags:
    """The part of SGLang's server arguments that decides the MoE kernel's shapes, number format and rows; which files
    of the model are loaded from where; and where the server is to be found and what it logs.

    Attributes are named as SGLang's own fields; None (or "") is "not given", so that SGLang's default of the release
    in question applies. Spellings are those of 0.4.9 (server_args.py) to 0.5.23 (arg_groups/fields/*.py).

    Attributes:
        model_overrides: `--json-model-override-args`, parsed.
        unread: flags that may change the answer but that moefix recognises without reading them.
        unchecked: flags that moefix does not know, where SGLang's own list of flags could not be read.
    """

    model_path: str = _flag("", _text, "--model")
    revision: str | None = _flag(None, _text)
    load_format: str = _flag("auto", _lower)
    download_dir: str | None = _flag(None, _text)
    speculative_draft_model_path: str | None = _flag(None, _text, "--speculative-draft-model")
    tp_size: int = _flag(1, _COUNT, "--tensor-parallel-size", "--tp")
    ep_size: int = _flag(1, _COUNT, "--expert-parallel-size", "--ep")
    dp_size: int = _flag(1, _COUNT, "--data-parallel-size", "--dp")
    pp_size: int = _flag(1, _COUNT, "--pipeline-parallel-size", "--pp")
    moe_dp_size: int = _flag(1, _COUNT, "--moe-data-parallel-size")
    enable_dp_attention: bool = _switch()
    quantization: str | None = _flag(None, _lower)
    dtype: str = _flag("auto", _dtype)
    disable_shared_experts_fusion: bool = _switch()
    enforce_shared_experts_fusion: bool = _switch()
    moe_runner_backend: str = _flag("auto", _lower)
    moe_a2a_backend: str = _flag("none", _lower)
    ep_num_redundant_experts: int = _flag(0, _NATURAL)
    mem_fraction_static: float | None = _flag(None, _real)
    cpu_offload_gb: int = _flag(0, _NATURAL)
    chunked_prefill_size: int | None = _flag(None, _SIZE)
    max_prefill_tokens: int | None = _flag(None, _COUNT)
    cuda_graph_max_bs: int | None = _flag(None, _COUNT, "--cuda-graph-max-bs-decode")
    cuda_graph_bs: tuple[int, ...] = _flag((), _COUNT, "--cuda-graph-bs-decode", nargs="+")
    disable_cuda_graph: bool = _switch("--disable-decode-cuda-graph")
    disable_cuda_graph_padding: bool = _switch()
    max_running_requests: int | None = _flag(None, _COUNT)
    speculative_algorithm: str | None = _flag(None, _text)
    speculative_num_steps: int | None = _flag(None, _NATURAL)
    speculative_eagle_topk: int | None = _flag(None, _COUNT)
    speculative_num_draft_tokens: int | None = _flag(None, _COUNT)
    enable_deterministic_inference: bool = _switch()
    enable_lora: bool = _switch()
    enable_torch_compile: bool = _switch()
    enable_two_batch_overlap: bool = _switch()
    enable_single_batch_overlap: bool = _switch()
    enable_mixed_chunk: bool = _switch()
    enable_ep_moe: bool = _switch()
    enable_deepep_moe: bool = _switch()
    kt_num_gpu_experts: int | None = _flag(None, _NATURAL)
    trust_remote_code: bool = _switch()
    host: str | None = _flag(None, _text)
    port: int = _flag(30000, _NATURAL)
    ssl_certfile: str | None = _flag(None, _text)
    log_level: str = _flag("info", _lower)
    skip_server_warmup: bool = _switch()
    nnodes: int = _flag(1, _COUNT)
    attn_dp_size: int = _flag(1, _COUNT, "--attention-data-parallel-size")
    model_overrides: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({}),
        metadata={"read": _object, "spelt": "json_model_override_args"},
    )
    unread: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


_READ: Mapping[str, Mapping[str, Any]] = {each.name: each.metadata for each in fields(ServerFlags) if each.metadata}

# Not read, but known without a tree: secrets, and what a server does without that only moefix asks.
_UNREAD = "cuda_graph_config"
_OTHERS = (_UNREAD, "config", "api_key", "admin_api_key", "ssl_keyfile_password", "ssl_keyfile", "ssl_ca_certs")


def _bundled() -> Declared:
    others = {name: {"read": _text} for name in _OTHERS}
    return Declared(tuple(_bundled_flag(name, how) for name, how in {**_READ, **others}.items()))


def _bundled_flag(name: str, how: Mapping[str, Any]) -> Flag:
    spelling = "--" + how.get("spelt", name).replace("_", "-")
    action = "store" if how["read"] else "store_true"
    return Flag((spelling, *how.get("others", ())), name, action, nargs=how.get("nargs"))


_OLD_RUNNERS = {
    "enable_flashinfer_moe": "flashinfer_cutlass",
    "enable_flashinfer_cutlass_moe": "flashinfer_cutlass",
    "enable_flashinfer_trtllm_moe": "flashinfer_trtllm",
    "enable_flashinfer_mxfp4_moe": "flashinfer_mxfp4",
    "enable_triton_kernel_moe": "triton_kernel",
}
"""Switches of 0.4.9 to 0.5.2 in the place of --moe-runner-backend (server_args.py:418-437 of 0.5.2)."""

BUNDLED = _bundled()
"""The flags that moefix knows by itself; a tree has many others."""

_FIELDS = {spelling: flag.dest for flag in BUNDLED.flags for spelling in flag.spellings}
"""The field by the flag's name: what SGLang calls it differs (--tp-size sets tensor_parallel_size in 0.4.9)."""


def known_flags(declared: Declared | None) -> Declared:
    """What a tree declares, or the bundled flags where it could not be read."""
    return declared if declared is not None and declared.flags else BUNDLED


def parse_flags(argv: Sequence[str], declared: Declared | None = None) -> ServerFlags:
    """The server flags of a command line, as SGLang understands them.

    Args:
        argv: the words, in any form that `fixer.sglang.words` knows.
        declared: what the tree has; without it unknown flags pass.

    Raises:
        UnknownFlagError: SGLang has no such flag; the hint names the nearest one.
        UsageError: a value is missing or cannot be what the flag needs; the message names the flag.
    """
    known = known_flags(declared)
    given, rest = read_words(argv, known)
    if rest and known is not BUNDLED and not has_plugins():
        raise UnknownFlagError(rest[0], nearest(rest[0], [name for flag in known.flags for name in flag.spellings]))
    values: dict[str, Any] = {}
    unread = [CONFIG] if known is BUNDLED and CONFIG in argv else []
    for each in given:
        check_words(each)
        name = next((_FIELDS[spelling] for spelling in each.flag.spellings if spelling in _FIELDS), "")
        if name == _UNREAD:
            unread.append(each.spelling)
        elif name in _READ:
            values |= _value(each, name)
        if each.flag.dest in _OLD_RUNNERS:
            values["moe_runner_backend"] = _OLD_RUNNERS[each.flag.dest]
    if values.get("quantization") == "unquant":
        values["quantization"] = None  # "what the checkpoint has" (server_args.py:4084-4091)
    if values.get("attn_dp_size", 1) > 1:  # in place of both from 0.5.22 on (arg_groups/parallel_hook.py:44-56)
        values |= {"enable_dp_attention": True, "dp_size": values["attn_dp_size"]}
    unchecked = [word.partition("=")[0] for word in rest if word.startswith("--")] if known is BUNDLED else []
    flags = ServerFlags(**values)
    return replace(flags, unread=tuple(dict.fromkeys(unread)), unchecked=tuple(dict.fromkeys(unchecked)))


def _value(given: Given, name: str) -> dict[str, Any]:
    """The field and its value; {} for a deprecated flag that sets nothing.

    Raises:
        UsageError: it is nothing that the field can be.
    """
    read = _READ[name]["read"]
    if read is None or not given.flag.takes_value:
        sets = given.flag.action in ("store_true", "BooleanOptionalAction") or "StoreTrue" in given.flag.action
        return {name: not given.spelling.startswith("--no-")} if sets else {}
    several = given.flag.nargs in ("+", "*")
    try:
        values = tuple(read(part) for text in given.texts for part in (text.split() if several else [text]))
    except ValueError as fault:
        raise UsageError(f"{given.spelling} is {shortened(' '.join(given.texts))}, but {fault}") from None
    return {name: values if several else values[0]} if values else {}
