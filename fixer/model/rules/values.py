"""Values of a config that anybody may have written, as the type that the rules need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fixer.base.errors import ModelError
from fixer.model.rules.family import MAX_DIMENSION


def read_mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def read_text(value: Any) -> str:
    """The value if it is text, else ""."""
    return value if isinstance(value, str) else ""


def read_integer(config: Mapping[str, Any], name: str, default: int) -> int:
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


def read_block_shape(config: Mapping[str, Any] | None, name: str) -> tuple[int, int] | None:
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
