"""Read and write tuning files in SGLang's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fixer.base.json_reading import parse_json
from fixer.workload import MOE_AXES, Axis, Tile, check_tile


def read_rows(path: Path) -> dict[int, Tile]:
    """The rows of a tuning file, in the file's order.

    Raises:
        ValueError: not such a file: not JSON, wrong types, absurd tiles.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or not content:
        raise ValueError("not a JSON object with rows")
    rows: dict[int, Tile] = {}
    for key, row in content.items():
        if not key.isdecimal() or not isinstance(row, dict):
            raise ValueError(f"row {key!r} is not a batch size with a configuration")
        rows[int(key)] = Tile.from_json(row)
    return rows


def nearest_row(rows: Mapping[int, Tile], tokens: int) -> Tile:
    """The row of a file that is nearest to M = `tokens`, the first one of a tie."""
    return rows[min(rows, key=lambda key: abs(key - tokens))]


MOST_ROWS = 1024


def render_table(table: Mapping[int, Tile], axes: Sequence[Axis] = MOE_AXES) -> bytes:
    """The file's content, to the byte as SGLang's tuner writes it: M ascending as text, four blanks of indent."""
    rows = {str(batch): table[batch].to_json(axes) for batch in sorted(table)}
    return (json.dumps(rows, indent=4) + "\n").encode()


_OPTIONS = {"num_ctas", "USE_TMA"}
"""All that a row may hold besides its axes. Triton refuses to launch with an option that it does not know, which stops
the server."""


def parse_table(content: bytes, tma: bool = True, axes: Sequence[Axis] = MOE_AXES) -> Mapping[int, Tile]:
    """The tiles of a tuning file's content, by M.

    Args:
        content: the file, which may be damaged or hostile.
        tma: whether USE_TMA may be true, as in a down projection's file.
        axes: of the kernel family that reads the file.

    Raises:
        ValueError: it is not a tuning file that SGLang could serve with; the text says why.
    """
    rows = parse_json(content)
    if not isinstance(rows, dict) or not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"it is not an object of 1 to {MOST_ROWS} rows")
    table = {_batch(key): _tile(key, row, tma, axes) for key, row in rows.items()}
    if len(table) != len(rows):
        raise ValueError("a batch size comes twice")
    return table


def _batch(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 8 and int(key) > 0):
        raise ValueError(f"{key[:40]!r} is no batch size")
    return int(key)


def _tile(key: str, row: object, tma: bool, axes: Sequence[Axis]) -> Tile:
    if not isinstance(row, dict):
        raise ValueError(f"row {key} is not an object")
    strange = sorted(set(row) - _OPTIONS - {axis.key for axis in axes})
    if strange:
        raise ValueError(f"row {key} has an unknown part {strange[0][:40]!r}")
    if row.get("num_ctas", 1) != 1:
        raise ValueError(f"row {key} asks for thread block clusters")
    tile = check_tile(Tile.from_json(row, axes), axes)
    if tile.use_tma and not tma:
        raise ValueError(f"row {key} has USE_TMA, which this file may not have")
    return tile
