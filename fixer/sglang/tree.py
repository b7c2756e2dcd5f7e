"""All that moefix knows of SGLang's tree: where it lies, its kernel's source, its tuning files and its defaults.

Nothing of SGLang is imported. What differs between releases is read off the tree itself where the tree shows it
(a folder that is there, a word in the source of the look-up), so that a release between those tested is served too.
Tested against 0.4.9, 0.5.17 and 0.5.23. Line numbers below are of 0.5.17, in `fused_moe_triton_config.py` (CFG).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path

from fixer.base.errors import SGLangError, harmless
from fixer.machine.cards import Card
from fixer.workload import NumberFormat, Projection, Tile, Workload

LOW_SHARED_MEMORY = 128 * 1024
"""Cards whose opt-in shared memory is below this get the small FP8 default, in bytes (CFG:19)."""

CONFIG_DIR_VARIABLE = "SGLANG_MOE_CONFIG_DIR"
"""Names a folder that REPLACES SGLang's own tree of tuning files (CFG:91)."""


BEFORE_MOEFIX = ".before-moefix"
"""What moefix appends to the name of a file that it replaces; empty where there was none."""


@dataclass(frozen=True)
class Release:
    """A release that moefix fetches by itself: any one wheel of it will do, since it is only read.

    `triton` is the version that its torch brings (wheel metadata: sglang → torch → triton).
    """

    version: str
    triton: str
    python: str
    wheel_sha256: str

    def folder(self, cache: Path) -> Path:
        """Where the fetched release is kept."""
        return cache / "sglang" / f"{self.version}-{self.wheel_sha256[:12]}"

    def is_kept(self, cache: Path) -> bool:
        """Whether it was fetched before."""
        return (self.folder(cache) / "complete").exists()


PINNED = "0.5.17"

RELEASES = {
    release.version: release
    for release in (
        Release("0.4.9", "3.3.1", "3.11", "8c2a13c37bc505930675f907fadbd66eef0539c32e31343be1bd2c34a3cd4c80"),
        Release("0.5.17", "3.6.0", "3.11", "575e38f5683624ded3b4bb267f637a098e5ed37d13a1d1ff5ea09bd781a04d16"),
        Release("0.5.23", "3.8.0", "3.11", "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937"),
    )
}

CONFIG_FOLDERS = (
    "srt/layers/moe/moe_runner/triton_utils/configs",
    "srt/layers/moe/fused_moe_triton/configs",
)
LOOKUP_SOURCES = (
    "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py",
    "srt/layers/moe/fused_moe_triton/fused_moe_triton_config.py",
    "srt/layers/moe/fused_moe_triton/fused_moe.py",
)
KERNEL_SOURCES = (
    "kernels/ops/moe/fused_moe_triton_kernels.py",
    "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_kernels.py",
    "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py",
    "srt/layers/moe/fused_moe_triton/fused_moe.py",
)
VERSION_SOURCES = ("_version.py", "version.py")


class Found(Enum):
    """Where a look-up of a tuning file ends."""

    SHIPPED = "shipped"
    OTHER_TRITON = "other_triton"
    NONE = "none"


@dataclass(frozen=True)
class Lookup:
    """What SGLang asks for, and what it gets.

    Attributes:
        folder: the running Triton's folder below SGLang's package or SGLANG_MOE_CONFIG_DIR ("configs/triton_3_6_0").
        gate_up, down: the file names, to the letter; `down` is "" for releases that read no separate file.
        found: where the gate-up file was found.
        gate_up_path, down_path: the files that SGLang would read, None where it finds none.
    """

    folder: str
    gate_up: str
    down: str
    found: Found
    gate_up_path: Path | None
    down_path: Path | None


@dataclass(frozen=True)
class TuningFile:
    """A file that SGLang ships: its name taken apart, and its rows by M."""

    path: Path
    device: str
    experts: int
    intermediate: int
    number_format: NumberFormat
    block_shape: tuple[int, int] | None
    per_channel_quant: bool
    projection: Projection
    rows: Mapping[int, Tile]


_FILE_NAME = re.compile(
    r"E=(?P<E>\d+),N=(?P<N>\d+),device_name=(?P<device>[^,]+?)(,dtype=(?P<dtype>\w+?))?"
    r"(,block_shape=\[(?P<bn>\d+), ?(?P<bk>\d+)\])?(?P<channel>,per_channel_quant=True)?(?P<down>_down)?\.json"
)


@dataclass(frozen=True)
class Tree:
    """One SGLang package folder (the one that holds `srt/`).

    Attributes:
        package: the folder.
        version: SGLang's version ("0.5.17").
        triton: the Triton version that names the folder of tuning files.
        ignored: tuning files to look past: they are bad and could not be moved away (`fixer.artefacts.check_files`).
    """

    package: Path
    version: str
    triton: str
    ignored: frozenset[Path] = frozenset()

    @cached_property
    def configs(self) -> Path:
        """The folder that holds `triton_*` folders of tuning files, honouring SGLANG_MOE_CONFIG_DIR as SGLang does."""
        override = os.environ.get(CONFIG_DIR_VARIABLE)
        if override and self.reads_config_dir_variable:
            return Path(override) / "configs"
        return self.shipped_configs

    @cached_property
    def shipped_configs(self) -> Path:
        """The folder of the tuning files in the package itself."""
        return self._first(CONFIG_FOLDERS, "its folder of MoE tuning files")

    @property
    def triton_folder(self) -> Path:
        """The running Triton's folder of tuning files; it need not exist yet."""
        return self.configs / _triton_folder(self.triton)

    @cached_property
    def kernel_source(self) -> Path:
        """The Python file with the `@triton.jit` function `fused_moe_kernel`."""
        for relative in KERNEL_SOURCES:
            path = self.package / relative
            if path.is_file() and "def fused_moe_kernel(" in path.read_text("utf-8"):
                return path
        raise SGLangError(
            f"SGLang {self.version} in {self.package} has no fused_moe_kernel where moefix looks for it.",
            "Use a supported release (README: tested releases), or name the folder with --sglang-root.",
        )

    @cached_property
    def _lookup_text(self) -> str:
        return self._first(LOOKUP_SOURCES, "the look-up of MoE tuning files").read_text("utf-8")

    @property
    def names_per_channel(self) -> bool:
        """File names say `per_channel_quant=True` (0.4.9 does not)."""
        return ",per_channel_quant=True" in self._lookup_text

    @property
    def reads_down_file(self) -> bool:
        """The down projection has a file of its own (0.4.9 has one joint file)."""
        return '"_down"' in self._lookup_text

    @property
    def has_low_shared_memory_default(self) -> bool:
        """The small FP8 default for cards under 128 KiB (since 0.5.14)."""
        return "_use_low_smem_fp8_default" in self._lookup_text

    @property
    def reads_config_dir_variable(self) -> bool:
        """SGLANG_MOE_CONFIG_DIR is honoured (0.4.9 does not)."""
        return CONFIG_DIR_VARIABLE in self._lookup_text

    def _first(self, relatives: tuple[str, ...], what: str) -> Path:
        for relative in relatives:
            path = self.package / relative
            if path.exists():
                return path
        raise SGLangError(
            f"SGLang {self.version} in {self.package} lacks {what}.",
            "Name the folder of a complete SGLang with --sglang-root.",
        )

    def file_name(self, workload: Workload, card: Card, projection: Projection) -> str:
        """The tuning file's name to the letter (CFG:44-58); "" where this release reads none for the projection."""
        if projection is Projection.DOWN and not self.reads_down_file:
            return ""
        parts = [f"E={workload.experts},N={workload.intermediate},device_name={card.sglang_name}"]
        if workload.number_format is not NumberFormat.NONE:
            parts.append(f"dtype={workload.number_format.value}")
        if workload.block_shape is not None and all(workload.block_shape):
            # SGLang writes a Python list there, blank included.
            parts.append(f"block_shape={list(workload.block_shape)}")
        if workload.per_channel_quant and self.names_per_channel:
            parts.append("per_channel_quant=True")
        return ",".join(parts) + ("_down" if projection is Projection.DOWN else "") + ".json"

    def lookup(self, workload: Workload, card: Card, *, without_moefix: bool = False) -> Lookup:
        """Follow SGLang's search: the running Triton's folder, then every other, newest first (CFG:91-140).

        Args:
            without_moefix: look past what moefix installed, as if it had never run: the file that was there before,
                or none.
        """
        find = self._find_before_moefix if without_moefix else self._find
        up_name = self.file_name(workload, card, Projection.GATE_UP)
        down_name = self.file_name(workload, card, Projection.DOWN)
        up_path = find(up_name)
        down_path = find(down_name) if down_name else None
        found = Found.NONE
        if up_path is not None:
            found = Found.SHIPPED if up_path.parent == self.triton_folder else Found.OTHER_TRITON
        return Lookup(f"configs/{_triton_folder(self.triton)}", up_name, down_name, found, up_path, down_path)

    def _folders(self) -> list[Path]:
        """Where SGLang looks, in its order."""
        others = sorted(self.configs.glob("triton_*"), key=_version_of_folder, reverse=True)
        return [self.triton_folder, *(folder for folder in others if folder != self.triton_folder)]

    def _find(self, name: str) -> Path | None:
        paths = (folder / name for folder in self._folders())
        return next((path for path in paths if path not in self.ignored and path.exists()), None)

    def _find_before_moefix(self, name: str) -> Path | None:
        for folder in self._folders():  # moefix may have tuned under an earlier Triton too
            before = folder / (name + BEFORE_MOEFIX)
            if not before.exists():
                before = folder / name
            elif before.stat().st_size == 0:
                continue  # there was no file of that name here, so SGLang went on to the other folders
            if before not in self.ignored and before.exists():
                return before
        return None

    def shipped_files(self) -> Iterator[TuningFile]:
        """Every tuning file for an NVIDIA card that SGLang ships and that can be read, in a stable order."""
        for path in sorted(self.shipped_configs.glob("triton_*/E=*device_name=NVIDIA*.json")):
            match = _FILE_NAME.fullmatch(path.name)
            if match is None or (match["dtype"] or "none") not in _FORMATS:
                continue
            try:
                rows = read_rows(path)
            except ValueError:
                continue  # a file for another kernel, or one that SGLang itself could not use
            yield TuningFile(
                path=path,
                device=match["device"],
                experts=int(match["E"]),
                intermediate=int(match["N"]),
                number_format=NumberFormat(match["dtype"] or "none"),
                block_shape=(int(match["bn"]), int(match["bk"])) if match["bn"] else None,
                per_channel_quant=bool(match["channel"]),
                projection=Projection.DOWN if match["down"] else Projection.GATE_UP,
                rows=rows,
            )

    def default_tile(self, workload: Workload, card: Card, tokens: int) -> Tile:
        """The configuration that SGLang computes for M = `tokens` where it finds no file (CFG:180-261)."""
        small = tokens <= workload.experts
        if workload.number_format is not NumberFormat.FP8_W8A8:
            return Tile(16, 32, 64, 1) if small else Tile(64, 64, 32, 8)
        if workload.block_shape is not None:
            block_n, block_k = workload.block_shape
            return Tile(64, block_n, block_k, 32, 4, 3)
        if self.has_low_shared_memory_default and card.shared_memory < LOW_SHARED_MEMORY:
            return Tile(32, 64, 256, 1, 4, 4) if small else Tile(64, 128, 256, 64, 4, 2)
        return Tile(64, 128, 128, 1, 4, 4) if small else Tile(128, 256, 128, 32, 8, 4)


_FORMATS = {number_format.value for number_format in NumberFormat}

_WEIGHT_ONLY = (NumberFormat.INT4_W4A16, NumberFormat.INT8_W8A16)

MOST_SHARED = 4
"""More shared experts than this are fused into no model; a larger difference in E has another cause."""


def workload_of_name(name: str, base: Workload) -> Workload:
    """The layer that a tuning file's name speaks of.

    Args:
        name: a gate-up file's name, as SGLang asked for it.
        base: the layer that the rules worked out, for what a name does not say: hidden size, experts a token, groups.

    Raises:
        ValueError: it is no such name, or its number format is one that moefix cannot tune.
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None or match["down"]:
        raise ValueError(f"{name[:120]!r} is no name of a gate-up file that moefix can read")
    if (match["dtype"] or "none") not in _FORMATS - {NumberFormat.FLOAT32.value}:
        raise ValueError(f"moefix cannot tune the number format {match['dtype']} of {name[:120]}")
    number_format = NumberFormat(match["dtype"] or "none")
    if number_format in _WEIGHT_ONLY and base.number_format is not number_format:
        raise ValueError(f"{name[:120]} does not say the group size of its {number_format.value} weights")
    experts, width = int(match["E"][:9]), int(match["N"][:9])
    if not (1 <= experts <= 1 << 16 and 1 <= width <= 1 << 20):
        raise ValueError(f"{name[:120]} has sizes that no layer has")
    keeps_groups = number_format in _WEIGHT_ONLY
    fused = experts - base.experts if abs(experts - base.experts) <= MOST_SHARED else 0
    whole = base.experts * base.ep_size
    return replace(
        base,
        experts=experts,
        intermediate=width,
        # Fused shared experts count twice: as experts, and as one choice of every token each.
        top_k=min(max(1, base.top_k + fused), experts if base.ep_size == 1 else whole),
        ep_size=base.ep_size if fused or whole % experts else whole // experts,
        number_format=number_format,
        block_shape=(int(match["bn"][:6]), int(match["bk"][:6])) if match["bn"] else None,
        per_channel_quant=bool(match["channel"]),
        group_size=base.group_size if keeps_groups else 0,
        has_zero_points=base.has_zero_points and keeps_groups,
    )


def _triton_folder(triton: str) -> str:
    return "triton_" + triton.replace(".", "_")


def _version_of_folder(folder: Path) -> tuple[int, ...]:
    digits = folder.name.removeprefix("triton_").split("_")
    return tuple(int(part) if part.isdigit() else -1 for part in digits)


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
    """SGLang's choice for M = `tokens`: the nearest key, the first one of a tie, no interpolation (CFG:300)."""
    return rows[min(rows, key=lambda key: abs(key - tokens))]


@dataclass(frozen=True)
class OwnChoice:
    """What SGLang runs for one M without moefix, and where it comes from ("default" or a file's path)."""

    gate_up: Tile
    down: Tile
    gate_up_source: str
    down_source: str


def own_choices(tree: Tree, lookup: Lookup, workload: Workload, card: Card) -> Callable[[int], OwnChoice]:
    """SGLang's own configuration of both projections as a function of M (CFG:264-341).

    The files are read once. The down projection's BLOCK_SIZE_M is forced to the gate-up's, since both share one
    sorting of tokens; a missing down file means the gate-up file's rows.

    Raises:
        SGLangError: a file that SGLang would read cannot be used.
    """
    up_rows = _usable_rows(lookup.gate_up_path)
    down_rows = _usable_rows(lookup.down_path)

    def choose(tokens: int) -> OwnChoice:
        up, up_source = tree.default_tile(workload, card, tokens), "default"
        if up_rows is not None:
            up, up_source = nearest_row(up_rows, tokens), str(lookup.gate_up_path)
        # Without a file of its own the down projection reuses the gate-up's row, but never its TMA (CFG:142-161).
        down, down_source = replace(up, use_tma=False), up_source
        if down_rows is not None:
            chosen = nearest_row(down_rows, tokens)
            down, down_source = replace(chosen, block_m=up.block_m), str(lookup.down_path)
        return OwnChoice(up, down, up_source, down_source)

    return choose


def _usable_rows(path: Path | None) -> dict[int, Tile] | None:
    if path is None:
        return None
    try:
        return read_rows(path)
    except ValueError as error:
        raise SGLangError(
            f"SGLang would read {path} and fail: {error}.", "Move that file away, or tune again with --fresh."
        ) from error


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
    if root is not None:
        return tree_at(Path(root))
    if version is not None:
        installed = installed_tree()
        return installed if installed and installed.version == version else fetched_tree(version, cache)
    installed = installed_tree()
    if installed is not None:
        return installed
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
            return Tree(package.resolve(), version, _triton_of(version))
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


def _triton_of(version: str) -> str:
    """The Triton that runs with an SGLang tree: the installed one beside an installed SGLang, else the release's."""
    spec = importlib.util.find_spec("sglang")
    if spec is not None or version not in RELEASES:
        try:
            return importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            pass
    return RELEASES.get(version, RELEASES[PINNED]).triton


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
    if relative in (*LOOKUP_SOURCES, *KERNEL_SOURCES, *VERSION_SOURCES):
        return True
    return relative.endswith(".json") and relative.startswith(tuple(folder + "/triton_" for folder in CONFIG_FOLDERS))


def _download(release: Release, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"sglang=={release.version} --hash=sha256:{release.wheel_sha256}\n")
    # One wheel for every machine: it is only read, so neither this machine's Python nor its processor matters.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--implementation", "cp", "--python-version", release.python]
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
