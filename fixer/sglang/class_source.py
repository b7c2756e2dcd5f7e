"""Reads architectures and quantisation methods off SGLang's source, by syntax tree."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

_OTHER_DEVICES = frozenset({"is_npu", "is_mps", "is_xpu", "is_cpu", "is_hip", "is_musa"})
"""What asks for a device that is no NVIDIA card."""


def read_architectures(models: Path) -> frozenset[str]:
    """The names that a config.json may have: `EntryClass` of each file in `srt/models`."""
    return frozenset(_architectures(models))


def read_methods(source: Path) -> frozenset[str]:
    """The quantisation methods that run on NVIDIA cards (the keys in srt/layers/quantization/__init__.py).

    Raises:
        OSError, SyntaxError, ValueError: the source cannot be read.
    """
    return frozenset(_methods(ast.parse(source.read_bytes()).body))


def _architectures(folder: Path) -> Iterator[str]:
    """The names in `EntryClass = ...`, of which each model's file has one at its outermost level."""
    for path in sorted(folder.glob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
            text = "\n" + path.read_text(encoding="utf-8")
            while "\nEntryClass" in text:
                text = text[text.index("\nEntryClass") + 1 :]
                statement = ast.parse(_statement(text)).body[0]
                if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                    yield from (node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name))


def _statement(text: str) -> str:
    """The first statement of a module's text: its first line, and what follows up to a line that ends a bracket."""
    first, _, rest = text.partition("\n")
    if first.count("[") == first.count("]"):
        return first
    return first + "\n" + rest[: rest.index("\n]") + 2] if "\n]" in rest else text


def _methods(body: list[ast.stmt]) -> Iterator[str]:
    """The keys of the module's dictionaries of methods, without those for other devices than NVIDIA's cards."""
    for node in body:
        if isinstance(node, ast.If):
            asked = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
            if "is_cuda" in asked or not asked & _OTHER_DEVICES:
                yield from _methods(node.body)
        elif _target(node).endswith("QUANTIZATION_METHODS") and not _target(node).startswith("CPU"):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Dict):
                    yield from (str(key.value) for key in inner.keys if isinstance(key, ast.Constant))


def _target(node: ast.stmt) -> str:
    """The name that a statement gives a value to, or changes by `NAME.update(...)`; "" for any other statement."""
    if isinstance(node, ast.Assign):
        place: ast.expr = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        place = node.target
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        place = node.value.func.value
    else:
        return ""
    return place.id if isinstance(place, ast.Name) else ""
