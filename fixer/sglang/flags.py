"""What matters of the user's SGLang flags to the MoE kernel and to the download, in every spelling that SGLang takes.

moefix passes the user's words on untouched; here they are only read. A flag that is not in `OPTIONS` is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from fixer.base.errors import UsageError

MAX_INTEGER = 2**31 - 1
"""No count on SGLang's command line is sensibly larger."""

MAX_CONFIG_BYTES = 1 << 20
"""Size limit of SGLang's `--config` file."""

MAX_JSON_DEPTH = 32
"""Nesting limit of `--json-model-override-args`."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ServerFlags:
    """The part of SGLang's server arguments that decides the MoE kernel's shapes, number format and rows; which files
    of the model are loaded from where; and where the server is to be found and what it logs.

    Attributes are named as SGLang's own fields; None (or "") is "not given", so that SGLang's default of the release
    in question applies.

    Attributes:
        model_overrides: `--json-model-override-args`, parsed.
        unread: flags that may change the answer but that moefix recognises without reading them.
    """

    model_path: str = ""
    revision: str | None = None
    load_format: str = "auto"
    download_dir: str | None = None
    speculative_draft_model_path: str | None = None
    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    moe_dp_size: int = 1
    enable_dp_attention: bool = False
    quantization: str | None = None
    dtype: str = "auto"
    disable_shared_experts_fusion: bool = False
    enforce_shared_experts_fusion: bool = False
    moe_runner_backend: str = "auto"
    moe_a2a_backend: str = "none"
    ep_num_redundant_experts: int = 0
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int | None = None
    cuda_graph_max_bs: int | None = None
    cuda_graph_bs: tuple[int, ...] = ()
    disable_cuda_graph: bool = False
    disable_cuda_graph_padding: bool = False
    max_running_requests: int | None = None
    speculative_algorithm: str | None = None
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None
    enable_deterministic_inference: bool = False
    enable_lora: bool = False
    enable_torch_compile: bool = False
    enable_two_batch_overlap: bool = False
    enable_single_batch_overlap: bool = False
    enable_mixed_chunk: bool = False
    enable_ep_moe: bool = False
    enable_deepep_moe: bool = False
    kt_num_gpu_experts: int | None = None
    trust_remote_code: bool = False
    host: str | None = None
    port: int = 30000
    ssl_certfile: str | None = None
    log_level: str = "info"
    skip_server_warmup: bool = False
    nnodes: int = 1
    model_overrides: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    unread: tuple[str, ...] = ()


class Kind(Enum):
    """How the value of a flag is written."""

    SWITCH = "no value"
    TEXT = "a text"
    COUNT = "a whole number from 1"
    NATURAL = "a whole number from 0"
    SIZE = "a whole number from 1, or -1"
    COUNTS = "one or more whole numbers from 1"
    DTYPE = "a dtype"
    OBJECT = "a JSON object"
    UNREAD = "anything"


@dataclass(frozen=True)
class Option:
    """One of SGLang's flags: the field it sets, how its value is written, all its spellings."""

    name: str
    kind: Kind
    spellings: tuple[str, ...]


def _option(name: str, kind: Kind, *others: str) -> Option:
    return Option(name, kind, ("--" + name.replace("_", "-"), *others))


# Names and aliases: server_args.py of 0.4.9 and 0.5.17, arg_groups/fields/*.py of 0.5.23.
OPTIONS: tuple[Option, ...] = (
    _option("model_path", Kind.TEXT, "--model"),
    _option("revision", Kind.TEXT),
    _option("load_format", Kind.TEXT),
    _option("download_dir", Kind.TEXT),
    _option("speculative_draft_model_path", Kind.TEXT, "--speculative-draft-model"),
    _option("tp_size", Kind.COUNT, "--tensor-parallel-size", "--tp"),
    _option("ep_size", Kind.COUNT, "--expert-parallel-size", "--ep"),
    _option("dp_size", Kind.COUNT, "--data-parallel-size", "--dp"),
    _option("pp_size", Kind.COUNT, "--pipeline-parallel-size", "--pp"),
    _option("moe_dp_size", Kind.COUNT, "--moe-data-parallel-size"),
    _option("enable_dp_attention", Kind.SWITCH),
    _option("quantization", Kind.TEXT),
    _option("dtype", Kind.DTYPE),
    _option("disable_shared_experts_fusion", Kind.SWITCH),
    _option("enforce_shared_experts_fusion", Kind.SWITCH),
    _option("moe_runner_backend", Kind.TEXT),
    _option("moe_a2a_backend", Kind.TEXT),
    _option("ep_num_redundant_experts", Kind.NATURAL),
    _option("chunked_prefill_size", Kind.SIZE),
    _option("max_prefill_tokens", Kind.COUNT),
    _option("cuda_graph_max_bs", Kind.COUNT, "--cuda-graph-max-bs-decode"),
    _option("cuda_graph_bs", Kind.COUNTS, "--cuda-graph-bs-decode"),
    _option("disable_cuda_graph", Kind.SWITCH, "--disable-decode-cuda-graph"),
    _option("disable_cuda_graph_padding", Kind.SWITCH),
    _option("max_running_requests", Kind.COUNT),
    _option("speculative_algorithm", Kind.TEXT),
    _option("speculative_num_steps", Kind.NATURAL),
    _option("speculative_eagle_topk", Kind.COUNT),
    _option("speculative_num_draft_tokens", Kind.COUNT),
    _option("enable_deterministic_inference", Kind.SWITCH),
    _option("enable_lora", Kind.SWITCH),
    _option("enable_torch_compile", Kind.SWITCH),
    _option("enable_two_batch_overlap", Kind.SWITCH),
    _option("enable_single_batch_overlap", Kind.SWITCH),
    _option("enable_mixed_chunk", Kind.SWITCH),
    _option("enable_ep_moe", Kind.SWITCH),
    _option("enable_deepep_moe", Kind.SWITCH),
    _option("kt_num_gpu_experts", Kind.NATURAL),
    _option("trust_remote_code", Kind.SWITCH),
    _option("host", Kind.TEXT),
    _option("port", Kind.NATURAL),
    _option("ssl_certfile", Kind.TEXT),
    _option("log_level", Kind.TEXT),
    _option("skip_server_warmup", Kind.SWITCH),
    _option("nnodes", Kind.COUNT),
    Option("model_overrides", Kind.OBJECT, ("--json-model-override-args",)),
    Option("config", Kind.TEXT, ("--config",)),
    Option("cuda_graph_config", Kind.UNREAD, ("--cuda-graph-config",)),
)

SECRET_FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
"""Flags whose value is a secret (server_args.py:1292-1309 of 0.5.17)."""

SECRET_OR_TLS = (*SECRET_FLAGS, "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs")
"""Flags that a server on 127.0.0.1 does without: it would log the secrets, and the others change the protocol."""

_BY_SPELLING: Mapping[str, Option] = {spelling: option for option in OPTIONS for spelling in option.spellings}

_DTYPES: Mapping[str, str] = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}

# SGLang compares these in lower case (model_config.py:1427, load_config.py:103), and its choices are lower case.
_LOWER_CASE = frozenset({"quantization", "moe_runner_backend", "moe_a2a_backend", "load_format", "log_level"})


def parse_flags(argv: Sequence[str]) -> ServerFlags:
    """The server flags of a command line.

    Takes `--flag value` and `--flag=value`, unambiguous abbreviations as argparse does, and a `--config` file, whose
    flags come before the command line's. Of a flag given twice the last counts; unknown flags are passed over.

    Raises:
        UsageError: a value is missing or cannot be what the flag needs; the message names the flag.
    """
    words = list(argv)
    values: dict[str, Any] = {}
    unread: list[str] = []
    for source in (_config_words(words, unread), words):
        for option, spelling, texts in _occurrences(source):
            if option.kind is Kind.UNREAD:
                unread.append(spelling)
            elif option.name != "config":
                values[option.name] = _value(option, spelling, texts)
    if values.get("quantization") == "unquant":
        values["quantization"] = None  # "what the checkpoint has" (server_args.py:4084-4091)
    return replace(ServerFlags(**values), unread=tuple(dict.fromkeys(unread)))


def secret_flags(words: Sequence[str]) -> tuple[str, ...]:
    """Those words of a command line that are flags with a secret behind them, abbreviated or not."""
    spellings = [word.partition("=")[0] for word in words]
    # --ssl-keyfile, which is a file's name, is a flag of its own.
    found = [spelt for spelt in spellings if len(spelt) > 4 and not "--ssl-keyfile".startswith(spelt)]
    return tuple(spelt for spelt in found if any(secret.startswith(spelt) for secret in SECRET_FLAGS))


def plain_flags(words: Sequence[str]) -> list[str]:
    """A command line without the flags of `SECRET_OR_TLS`, abbreviated or not, and without their values."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        spelt, equals, _ = word.partition("=")
        if len(spelt) <= 4 or not any(flag.startswith(spelt) for flag in SECRET_OR_TLS):
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def _occurrences(words: Sequence[str]) -> Iterator[tuple[Option, str, list[str]]]:
    """Each known flag of a command line, as it was spelled, with the words of its value."""
    position = 0
    while position < len(words):
        spelling, equals, attached = words[position].partition("=")
        position += 1
        option = _option_for(spelling)
        if option is None:
            continue
        texts = [attached] if equals else []
        if not equals and option.kind is not Kind.SWITCH:
            room = len(words) if option.kind is Kind.COUNTS else position + 1
            while position < min(room, len(words)) and not words[position].startswith("--"):
                texts.append(words[position])
                position += 1
            if not texts:
                raise UsageError(f"{spelling} needs a value: {option.kind.value}")
        yield option, spelling, texts


def _option_for(spelling: str) -> Option | None:
    """The flag that a word is, abbreviated or not; None for anything else."""
    if not spelling.startswith("--") or len(spelling) < 4:
        return None
    exact = _BY_SPELLING.get(spelling)
    if exact is not None:
        return exact
    meant = {option.name: option for known, option in _BY_SPELLING.items() if known.startswith(spelling)}
    return next(iter(meant.values())) if len(meant) == 1 else None


def _value(option: Option, spelling: str, texts: Sequence[str]) -> Any:
    """The value of one flag, checked.

    Raises:
        UsageError: it is not of the flag's kind.
    """
    if option.kind is Kind.SWITCH:
        return _switch(spelling, texts)
    if option.kind is Kind.COUNTS:
        return tuple(_integer(option, spelling, part) for text in texts for part in text.split())
    text = texts[0]
    if option.kind is Kind.TEXT:
        if not text.strip():
            raise UsageError(f"{spelling} is empty")
        return text.lower() if option.name in _LOWER_CASE else text
    if option.kind is Kind.DTYPE:
        if text.lower() not in _DTYPES:
            raise UsageError(f"{spelling} is {_short(text)}, not one of {', '.join(_DTYPES)}")
        return _DTYPES[text.lower()]
    if option.kind is Kind.OBJECT:
        return _json_object(spelling, text)
    return _integer(option, spelling, text)


def _switch(spelling: str, texts: Sequence[str]) -> bool:
    """A flag without a value; `--flag=true` and `--flag=false` are read as meant."""
    if not texts:
        return True
    meanings = {"true": True, "1": True, "false": False, "0": False}
    if texts[0].lower() not in meanings:
        raise UsageError(f"{spelling} takes no value, but got {_short(texts[0])}")
    return meanings[texts[0].lower()]


def _integer(option: Option, spelling: str, text: str) -> int:
    """A whole number in the range of the flag's kind."""
    least = 0 if option.kind is Kind.NATURAL else 1
    digits = text.strip().removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else None
    allowed = number is not None and least <= number <= MAX_INTEGER
    if number is None or not (allowed or (option.kind is Kind.SIZE and number == -1)):
        raise UsageError(f"{spelling} is {_short(text)}, but must be {option.kind.value}")
    return number


def _json_object(spelling: str, text: str) -> Mapping[str, Any]:
    """A JSON object of bounded nesting."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{spelling} is not JSON: {_short(str(error))}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{spelling} must be a JSON object such as '{{\"num_experts\": 64}}'")
    if json_depth(value) > MAX_JSON_DEPTH:
        raise UsageError(f"{spelling} is nested deeper than {MAX_JSON_DEPTH}")
    return MappingProxyType(value)


def json_depth(value: Any) -> int:
    """How deep lists and objects are nested in a parsed JSON value; 0 for a plain value. Never recurses."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _short(text: str) -> str:
    """A user's text, quoted, on one line, of bounded length."""
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _config_words(words: Sequence[str], unread: list[str]) -> list[str]:
    """The flags of SGLang's `--config` file as words of a command line; [] without one.

    Only the plain form is read, one `key: value` a line (server_args_config_parser.py reads YAML in full); where the
    file has anything else, "--config" is put into `unread`.

    Raises:
        UsageError: the file cannot be read.
    """
    named = [texts[0] for option, _, texts in _occurrences(words) if option.name == "config"]
    if not named:
        return []
    if len(named) > 1:
        raise UsageError("--config is given more than once; SGLang takes one")
    result: list[str] = []
    for line in _config_text(Path(named[0])).splitlines():
        key, separator, value = line.split(" #")[0].partition(":")
        if not line.strip() or line.lstrip().startswith("#") or line.strip() == "---":
            continue
        if not separator or line[0].isspace() or line[0] == "-":
            unread.append("--config")
            continue
        result += _config_flag(key.strip(), value.strip(), unread)
    return result


def _config_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"--config {path}: larger than {MAX_CONFIG_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UsageError(f"--config {_short(str(path))} cannot be read as a text file") from None


def _config_flag(key: str, value: str, unread: list[str]) -> list[str]:
    """One `key: value` of the file as words; a value that is no plain scalar or flat list is left unread."""
    flag = "--" + key.strip("\"'").replace("_", "-")
    option = _option_for(flag)
    if option is None or option.name == "config":
        return []
    if value.startswith("[") and value.endswith("]"):
        return [flag, *(part.strip() for part in value[1:-1].split(",") if part.strip())]
    if not value or value[0] in "{&*|>![":
        unread.append("--config")
        return []
    if option.kind is Kind.SWITCH:
        return [flag] if value.lower() == "true" else []
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return [f"{flag}={value[1:-1] if quoted else value}"]
