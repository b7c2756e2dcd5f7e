"""SGLang's own parser, for tests: `python real_parser.py FOLDER` prints what `ServerArgs.add_cli_args` adds, as JSON.

With a JSON list of command lines on its standard input it prints what each of them sets. FOLDER holds `sglang/`. The
module and its declarations of flags are imported for real; everything else that they import (PyTorch, Triton, the rest
of SGLang) is a stand-in that takes any use.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

REAL = ("sglang.srt.server_args", "sglang.srt.arg_groups")
"""Modules of SGLang that declare flags; every other one is a stand-in."""


class Anything(MagicMock):
    """Stands for whatever is imported; as a base class or a type it is a plain class."""

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        mine = name == "sglang" or name.startswith("sglang.")
        real = mine and (name.startswith(REAL) or name in ("sglang", "sglang.srt"))
        if real or (not mine and name.partition(".")[0] in sys.stdlib_module_names | {"msgspec", "yaml"}):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []  # type: ignore[attr-defined]
        cache: dict[str, Any] = {}

        def anything(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in ("json_list_type", "nullable_str", "human_readable_int", "parse_cuda_graph_config_arg"):
                return cache.setdefault(name, _named(name))
            return cache.setdefault(name, Anything(name=name))

        module.__getattr__ = anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _named(name: str) -> Any:
    def convert(value: str) -> str:
        return value

    convert.__name__ = convert.__doc__ = name
    return convert


def plain(value: Any) -> Any:
    """A value as JSON has it; what is no plain value is "?"."""
    if isinstance(value, (list, tuple, set)):
        items = [plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set) else items
    return value if value is None or isinstance(value, (str, int, float, bool)) else "?"


class RefusedError(Exception):
    """SGLang's parser ends the program."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RefusedError(message)


def own_parser(folder: str) -> argparse.ArgumentParser:
    """SGLang's parser, of the tree in `folder`."""
    sys.path.insert(0, folder)
    for name in ("sglang", "sglang.srt"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    sys.meta_path.insert(0, StandIns())
    from sglang.srt.server_args import ServerArgs

    parser = Parser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    return parser


def rows_of(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Every option but --help."""
    return [
        {
            "spellings": list(action.option_strings),
            "dest": action.dest,
            "class": type(action).__name__,
            "type": getattr(action.type, "__name__", None),
            "nargs": action.nargs,
            "choices": plain(action.choices),
            "default": plain(action.default),
        }
        for action in parser._actions
        if "--help" not in action.option_strings
    ]


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any] | str:
    """What a command line sets, or why it is refused."""
    try:
        return {name: plain(value) for name, value in vars(parser.parse_args(words)).items()}
    except RefusedError as fault:
        return str(fault)


if __name__ == "__main__":
    real, lines = own_parser(sys.argv[1]), json.loads(sys.stdin.read() or "null")
    print(json.dumps(rows_of(real) if lines is None else [parsed(real, line) for line in lines]))
