"""Read a config.json that anybody may have written: bounded in size, depth and digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixer.base.errors import ModelError
from fixer.model.hub_answers import MOST_CONFIG_BYTES
from fixer.sglang.flags import json_depth

MAX_CONFIG_BYTES = MOST_CONFIG_BYTES
"""Largest config.json that is read."""


MAX_DEPTH = 64
"""Deepest nesting that is read."""


_MAX_DIGITS = 20


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object out of a file of bounded size and nesting.

    Raises:
        ModelError: it cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        value = json.loads(raw, parse_int=_whole)
    except RecursionError:
        raise ModelError(f"{path.name} is nested too deep") from None
    except _LongNumberError:
        raise ModelError(f"{path.name} holds a number of more than {_MAX_DIGITS} digits, which no size has") from None
    except ValueError as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ModelError(f"{path.name} is not JSON{where}", "was the download cut short?") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is no JSON object")
    if json_depth(value) > MAX_DEPTH:
        raise ModelError(f"{path.name} is nested deeper than {MAX_DEPTH}")
    return value


class _LongNumberError(ValueError):
    """A number of more digits than any size has."""


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _LongNumberError
    return int(digits)
