"""One of the server's flags, and which files of SGLang's tree declare them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DECLARING = (
    "srt/server_args.py",
    "srt/arg_groups/",
    "srt/server_args_config_parser.py",
    "srt/utils/server_args_config_parser.py",
    "srt/layers/quantization/__init__.py",
    "srt/models/",
)
"""Files, or folders of files, below SGLang's package that say what it has; a fetched release keeps them."""

Plain = str | int | float | bool | None | list[Any]
"""What a value is read as: what JSON can hold."""


@dataclass(frozen=True)
class Flag:
    """One of the server's flags, as argparse is told of it.

    Attributes:
        spellings: all its names, the first one is the name to show ("--tp-size").
        dest: the field that it sets ("tp_size").
        action: "store", "store_true", "store_false", "store_const", "BooleanOptionalAction", or a class of SGLang's.
        type: the converter's name: "str", "int", "float", "json_list_type", ...
        nargs: as argparse has it: None for one value, "+", "*", "?", or a number of values.
        choices: the values that are taken; None where any is, or where they cannot be read.
        default: where it can be read, else None.
        const: what an action without a value stores.
    """

    spellings: tuple[str, ...]
    dest: str
    action: str = "store"
    type: str = "str"
    nargs: str | int | None = None
    choices: tuple[Plain, ...] | None = None
    default: Plain = None
    const: Plain = None

    @property
    def takes_value(self) -> bool:
        """Whether words follow it."""
        return self.action not in _WITHOUT_VALUE and self.nargs != 0


_WITHOUT_VALUE = frozenset({"store_true", "store_false", "store_const", "BooleanOptionalAction"})


def flag_files(srt: Path) -> tuple[Path, ...]:
    """The files that declare flags, in order of their names."""
    return (srt / "server_args.py", *sorted((srt / "arg_groups").rglob("*.py")))
