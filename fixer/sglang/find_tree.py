"""Find SGLang's tree: the installed one, a named folder, or a release fetched from PyPI."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from fixer.base.errors import SGLangError
from fixer.base.text import harmless
from fixer.sglang.flag import DECLARING
from fixer.sglang.lookup import LOOKUP_SOURCES
from fixer.sglang.releases import PINNED, RELEASES, Release, nearest
from fixer.sglang.tree import CALLERS, CONFIG_FOLDERS, KERNEL_SOURCES, Tree
from fixer.sglang.triton_version import triton_of

VERSION_SOURCES = ("_version.py", "version.py")


def find_tree(root: str | None, version: str | None, cache: Path, *, fetch: bool = True) -> Tree:
    """The SGLang tree to work on.

    Args:
        root: `--sglang-root`: a package folder, a folder that holds `sglang/`, or a source checkout.
        version: `--sglang`: a release to fetch instead of what is installed.
        cache: where fetched releases are kept.
        fetch: allow the pinned release to be fetched where no SGLang is installed.

    Raises:
        SGLangError: there is none, or it is not SGLang.
    """
    found = tree_at(Path(root)) if root is not None else installed_tree()
    if found is not None and (root is not None or version in (None, found.version)):
        return replace(found, nearest=partial(nearest_tree, found.release, cache, fetch))
    if version is not None:
        return fetched_tree(version, cache)
    if not fetch:
        raise SGLangError(
            "SGLang is not installed in this Python environment.",
            "Install it (pip install sglang), use the moefix image, or name a tree with --sglang-root.",
        )
    return fetched_tree(PINNED, cache)


def installed_tree() -> Tree | None:
    """The SGLang of this Python environment, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations)))
    if not (package / "srt").is_dir():
        return None
    return tree_at(package)


def tree_at(root: Path) -> Tree:
    """The tree in a folder given by the user.

    Raises:
        SGLangError: no SGLang is there, or its version cannot be told.
    """
    for package in (root, root / "sglang", root / "python" / "sglang"):
        if (package / "srt").is_dir():
            version = _version_of(package)
            return Tree(package.resolve(), version, triton_of(package.resolve(), version))
    raise SGLangError(
        f"There is no SGLang in {root}.", "--sglang-root takes the folder that holds sglang/srt, or a source checkout."
    )


def _version_of(package: Path) -> str:
    for relative in VERSION_SOURCES:
        path = package / relative
        if path.is_file():
            match = re.search(r"^__version__\s*=\s*(?:version\s*=\s*)?['\"]([0-9][^'\"]*)", path.read_text(), re.M)
            if match:
                return match[1]
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise SGLangError(
            f"SGLang in {package} does not say which version it is.", "Install it, or check out a release tag."
        ) from None


def fetched_tree(version: str, cache: Path) -> Tree:
    """A known release's tree: from the cache, else from its wheel (pip, no dependencies, checked by hash).

    Raises:
        SGLangError: moefix does not know the release, or pip could not fetch it.
    """
    release = RELEASES.get(version)
    if release is None:
        raise SGLangError(
            f"moefix cannot fetch SGLang {version}: it knows {', '.join(RELEASES)}.",
            "Install that release, or name its folder with --sglang-root.",
        )
    home = release.folder(cache)
    if not release.is_kept(cache):
        _fetch(release, home)
    return Tree(home / "sglang", version, release.triton)


def _fetch(release: Release, home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        wheel = _download(release, Path(scratch))
        unpacked = Path(scratch) / "tree"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if _wanted(name)])
        (unpacked / "complete").write_text(release.wheel_sha256 + "\n")
        try:
            unpacked.rename(home)
        except OSError:
            if not (home / "complete").exists():  # else another process was faster
                raise


def _wanted(name: str) -> bool:
    relative = name.removeprefix("sglang/")
    if relative in (*LOOKUP_SOURCES, *CALLERS, *KERNEL_SOURCES, *VERSION_SOURCES):
        return True
    if relative.endswith(".py") and relative.startswith(DECLARING):
        return True
    return relative.endswith(".json") and relative.startswith(tuple(folder + "/" for folder in CONFIG_FOLDERS))


def _download(release: Release, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"sglang=={release.version} --hash=sha256:{release.wheel_sha256}\n")
    # One wheel for every machine: it is only read, so neither this machine's Python nor its processor matters.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--implementation", "cp", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_34_x86_64", "--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("sglang-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise SGLangError(
            f"pip could not fetch SGLang {release.version}: {harmless(lines[-1].removeprefix('ERROR: '))}",
            "Check that PyPI is reachable (pip's own settings are used), or name a tree with --sglang-root.",
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != release.wheel_sha256:
        raise SGLangError(f"The wheel of SGLang {release.version} is not the one that moefix knows.")
    return wheels[0]


def nearest_tree(release: str, cache: Path, fetch: bool) -> Tree:
    """The tree of the known release that is nearest to another one, from the cache or from PyPI.

    Raises:
        SGLangError: it is not in the cache, and nothing may be fetched, or fetching failed.
    """
    known = nearest(release)
    if not fetch and not known.is_kept(cache):
        raise SGLangError(f"SGLang {known.version} is not in the cache")
    return fetched_tree(known.version, cache)
