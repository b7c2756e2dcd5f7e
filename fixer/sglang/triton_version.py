"""Which Triton runs with an SGLang tree: it names the folder in which SGLang looks for tuning files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from fixer.sglang.releases import RELEASES, TRITON_OF_TORCH, nearest, placed

_PACKAGES = ("triton", "pytorch-triton")

_TORCH_PIN = re.compile(r"""(?:^Requires-Dist: |^\s*["'])torch\s*==\s*([0-9.]+[0-9])""", re.MULTILINE)
"""In a wheel's METADATA or in pyproject.toml. The first one counts: SGLang names its CUDA build before the others."""


def triton_of(package: Path, version: str) -> str:
    """The Triton version that runs with a tree.

    The running installation's own for the SGLang that is installed here; for any other tree the one that lies beside
    it, else the one that the torch it pins brings, else that of its release, or of the one that is nearest.

    Args:
        package: the folder that holds `srt/`.
        version: SGLang's version.
    """
    if _is_installed(package):
        for name in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(name)
    beside = next(package.parent.glob("triton-*.dist-info"), None)
    if beside is not None:
        return beside.name.removeprefix("triton-").removesuffix(".dist-info")
    for text in _pins(package):
        torch = _TORCH_PIN.search(text)
        if torch is not None and torch[1] in TRITON_OF_TORCH:
            return TRITON_OF_TORCH[torch[1]]
    release = placed(package, version)
    return RELEASES.get(release, nearest(release)).triton


def _is_installed(package: Path) -> bool:
    spec = importlib.util.find_spec("sglang")
    places = spec.submodule_search_locations if spec is not None else None
    return any(Path(place).resolve() == package for place in places or ())


def _pins(package: Path) -> Iterator[str]:
    """What the wheel's metadata beside the package says, else the checkout's pyproject.toml."""
    for path in (*package.parent.glob("sglang-*.dist-info/METADATA"), package.parent / "pyproject.toml"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield path.read_text("utf-8")
