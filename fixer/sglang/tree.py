"""All that moefix knows of SGLang's tree: where it lies, its kernel's source, its tuning files and its defaults.

Nothing of SGLang is imported. What differs between releases is read off the tree itself where the tree shows it
(a folder that is there, a word in the source of the look-up), so that a release between those tested is served too.
Tested against 0.4.9, 0.5.17 and 0.5.23. Line numbers below are of 0.5.17, in `fused_moe_triton_config.py` (CFG).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path

from fixer.base.errors import SGLangError
from fixer.machine.cards import Card
from fixer.sglang.tuning_files import read_rows
from fixer.workload import NumberFormat, Projection, Tile, Workload

LOW_SHARED_MEMORY = 128 * 1024
"""Cards whose opt-in shared memory is below this get the small FP8 default, in bytes (CFG:19)."""

CONFIG_DIR_VARIABLE = "SGLANG_MOE_CONFIG_DIR"
"""Names a folder that REPLACES SGLang's own tree of tuning files (CFG:91)."""


BEFORE_MOEFIX = ".before-moefix"
"""What moefix appends to the name of a file that it replaces; empty where there was none."""


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
