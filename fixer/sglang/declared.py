"""What an SGLang tree has: architectures, quantisation methods, runner backends, and all flags of its server.

Read from the source by syntax tree, never imported, so it holds for any release and any build. What moefix says that
SGLang does not know comes from here, and from no table of releases.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fixer.base.data_folder import DataFolder
from fixer.base.errors import StoreError
from fixer.base.files import read_or_set_aside, write_atomically
from fixer.sglang.flag import Flag, flag_files
from fixer.sglang.tree import Tree

SCHEMA = 1
"""Of the cached file; part of its name, so that an older moefix's is read anew."""

METHODS_SOURCE = "srt/layers/quantization/__init__.py"
MODELS = "srt/models"


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
    path = DataFolder(home).cache / "declared" / f"{SCHEMA}-{_digest(package)}.json"
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
    from fixer.sglang.class_source import read_architectures, read_methods
    from fixer.sglang.flag_source import read_flags

    flags: tuple[Flag, ...] = ()
    methods: frozenset[str] = frozenset()
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        flags = read_flags(package / "srt")
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        methods = read_methods(package / METHODS_SOURCE)
    return Declared(flags, read_architectures(package / MODELS), methods)
