"""What an SGLang tree has: architectures, quantisation methods, runner backends, and all flags of its server.

Read from the source by syntax tree, never imported, so it holds for any release and any build. What moefix says that
SGLang does not know comes from here, and from no table of releases.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fixer.base.errors import StoreError
from fixer.base.files import read_or_set_aside, write_atomically
from fixer.sglang.flag_source import Flag, flag_files, read_flags
from fixer.sglang.tree import Tree

SCHEMA = 1
"""Of the cached file; part of its name, so that an older moefix's is read anew."""

METHODS_SOURCE = "srt/layers/quantization/__init__.py"
MODELS = "srt/models"

_OTHER_DEVICES = frozenset({"is_npu", "is_mps", "is_xpu", "is_cpu", "is_hip", "is_musa"})
"""What asks for a device that is no NVIDIA card."""


@dataclass(frozen=True)
class Declared:
    """What one tree has. Each part is empty where the tree does not show it, which says nothing.

    Attributes:
        flags: the server's, in the order in which SGLang adds them.
        architectures: names that a config.json may have (EntryClass of srt/models/*.py).
        quantization_methods: those that run on NVIDIA cards (the keys in srt/layers/quantization/__init__.py).
        package: the folder `sglang` that it was read from, "" for none; not kept in the cache.
    """

    flags: tuple[Flag, ...] = ()
    architectures: frozenset[str] = frozenset()
    quantization_methods: frozenset[str] = frozenset()
    package: str = ""

    @property
    def runner_backends(self) -> tuple[str, ...]:
        """What `--moe-runner-backend` takes."""
        found = next((flag for flag in self.flags if flag.dest == "moe_runner_backend"), None)
        return tuple(map(str, found.choices)) if found is not None and found.choices else ()


NOTHING_DECLARED = Declared()
"""For a tree that is not at hand."""


def declared_of(tree: Tree, home: Path | None = None) -> Declared:
    """What a tree has, from the data folder where the same source was read before.

    Args:
        tree: SGLang's.
        home: the data folder, None for none.
    """
    if tree.package not in _read_here:
        _read_here[tree.package] = _declared(tree.package, home)
    return _read_here[tree.package]


_read_here: dict[Path, Declared] = {}
"""What this process has read, by package."""


def _declared(package: Path, home: Path | None) -> Declared:
    if home is None:
        return replace(_read(package), package=str(package))
    path = home / "cache" / "declared" / f"{SCHEMA}-{_digest(package)}.json"
    kept, _ = read_or_set_aside(path, _from_json)
    if kept is None:
        kept = _read(package)
        with contextlib.suppress(StoreError):
            write_atomically(path, msgspec.json.encode(kept, order="deterministic"))
    return replace(kept, package=str(package))


def _from_json(content: bytes) -> Declared:
    return msgspec.json.decode(content, type=Declared)  # msgspec.ValidationError is a ValueError


def _digest(package: Path) -> str:
    """A hash of all that is read."""
    total = hashlib.sha256()
    for path in (*flag_files(package / "srt"), package / METHODS_SOURCE, *sorted((package / MODELS).glob("*.py"))):
        with contextlib.suppress(OSError):
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:24]


def _read(package: Path) -> Declared:
    """Read the source; a part that cannot be read is left empty."""
    flags: tuple[Flag, ...] = ()
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        flags = read_flags(package / "srt")
    methods: frozenset[str] = frozenset()
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        methods = frozenset(_methods(ast.parse((package / METHODS_SOURCE).read_bytes()).body))
    return Declared(flags, frozenset(_architectures(package / MODELS)), methods)


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
            asked = {
                call.func.id
                for call in ast.walk(node.test)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            }
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
