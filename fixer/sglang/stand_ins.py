"""What stands in for the rest of SGLang, for PyTorch and for the operating system while a cut function runs."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fixer.machine.cards import Card
from fixer.workload import NumberFormat, Workload


@dataclass
class Tensor:
    """All that a cut function asks of a tensor."""

    shape: tuple[int, ...]
    dtype: str = ""

    def size(self, dimension: int) -> int:
        """Elements along a dimension."""
        return self.shape[dimension]


def layer_arguments(workload: Workload) -> dict[str, Any]:
    """The arguments of SGLang's fused experts for a layer, by the caller's parameter names.

    Packed 4-bit weights: `w2` is [E, hidden, N] with N as in the file's name, `w1` [E, 4N, hidden / 2].
    """
    number_format = workload.number_format
    packed = 2 if number_format is NumberFormat.INT4_W4A16 else 1
    width = workload.intermediate * packed * (2 if workload.gated else 1)
    groups = [0, workload.group_size] if workload.group_size else None
    return {
        "hidden_states": Tensor((1, workload.hidden_size), workload.activation_dtype),
        "w1": Tensor((workload.experts, width, workload.hidden_size // packed)),
        "w2": Tensor((workload.experts, workload.hidden_size, workload.intermediate)),
        "topk_weights": Tensor((1, workload.top_k)),
        "topk_ids": Tensor((1, workload.top_k)),
        "use_fp8_w8a8": number_format is NumberFormat.FP8_W8A8,
        "use_int8_w8a8": number_format is NumberFormat.INT8_W8A8,
        "use_int8_w8a16": number_format is NumberFormat.INT8_W8A16,
        "use_int4_w4a16": number_format is NumberFormat.INT4_W4A16,
        "per_channel_quant": workload.per_channel_quant,
        "block_shape": list(workload.block_shape) if workload.block_shape else groups,
    }


class _Silent:
    """A logger that says nothing: what is opened is seen, not read off a line."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def card_stand_ins(card: Card) -> dict[str, Any]:
    """What SGLang's functions ask about the card and the platform, for a card of NVIDIA's."""
    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        shared_memory_per_block_optin=card.shared_memory,
    )
    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_name=lambda *_: card.name,
        get_device_capability=lambda *_: card.capability,
        get_device_properties=lambda *_: properties,
    )
    types = {name: name for name in ("float16", "bfloat16", "float32")}
    return {
        "__import__": _imported,
        "functools": functools,
        "torch": SimpleNamespace(cuda=cuda, float="float32", half="float16", **types),
        "get_device_name": cuda.get_device_name,
        "get_bool_env_var": lambda *_: False,
        "is_sm90_supported": lambda *_: card.capability[0] == 9,
        "is_batch_invariant_mode_enabled": lambda: False,
        "is_cuda": lambda: True,
        "is_hip": lambda: False,
        "_is_cuda": True,
        "_is_hip": False,
        "_use_aiter": False,
    }


def lookup_stand_ins(
    card: Card,
    *,
    triton: str,
    environ: Mapping[str, str],
    exists: Callable[[str], bool],
    names: Callable[[str], list[str]],
    opened: Callable[..., Any],
    deterministic: bool,
) -> dict[str, Any]:
    """What the look-up's functions and their caller ask for, files included.

    Args:
        exists, names, opened: in place of `os.path.exists`, `os.listdir` and `open`.
        deterministic: `--enable-deterministic-inference` is given.
    """
    path = SimpleNamespace(
        **{name: getattr(os.path, name) for name in ("join", "dirname", "basename", "realpath", "abspath")},
        exists=exists,
        isfile=exists,
    )
    flag = SimpleNamespace(enable_deterministic_inference=deterministic)
    server_args = SimpleNamespace(deterministic=flag, enable_deterministic_inference=deterministic)
    return {
        **card_stand_ins(card),
        "os": SimpleNamespace(path=path, environ=environ, getenv=environ.get, listdir=names),
        "open": opened,
        "json": json,
        "logger": _Silent(),
        "log_info_on_rank0": _Silent().info,
        "triton": SimpleNamespace(__version__=triton),
        "padding_size": 0,
        "get_global_server_args": lambda: server_args,
        "get_server_args": lambda: server_args,
        "get_exec": lambda: server_args,
        # Triton has had tensor descriptors since 3.3, before any release that asks.
        "_down_moe_use_tma": lambda: True,
        "_moe_support_tma": lambda: True,
    }


def _imported(name: str, *_: Any) -> Any:
    """What a function imports while it runs: the tests' own override of the configuration, which a server has not."""
    if not name.startswith("sglang."):
        raise ImportError(f"no module {name} here", name=name)
    return SimpleNamespace(get_config=lambda: None)


def _nothing(*_: Any) -> Any:
    raise FileNotFoundError


LOOKUP_NAMES = frozenset(
    lookup_stand_ins(
        Card("", (9, 0), 0, 0),
        triton="",
        environ={},
        exists=_nothing,
        names=_nothing,
        opened=_nothing,
        deterministic=False,
    )
) | {"__file__"}
"""The names that the look-up's functions find beside one another."""

CARD_NAMES = frozenset(card_stand_ins(Card("", (9, 0), 0, 0)))
"""The names that a function about the card finds."""
