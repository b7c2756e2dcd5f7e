"""SGLang's tree: where it lies, its kernel's source, its tuning files, and what it does with them.

Nothing of SGLang is imported, and no rule of its look-up is written here: the tree's own functions are cut out and run
(`fixer.sglang.lookup`), so that a release that nobody tried is served too.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from fixer.base.errors import SGLangError
from fixer.machine.cards import Card
from fixer.sglang.cut import UnknownFormError
from fixer.sglang.lookup import (
    CALLER,
    CONFIG_DIR_VARIABLE,
    LOOKUP_SOURCES,
    Asking,
    Chosen,
    Disk,
    Files,
    LookupStopsError,
    OwnLookup,
    World,
    lookup_source,
)
from fixer.sglang.releases import placed
from fixer.sglang.tuning_files import read_rows
from fixer.workload import NumberFormat, Projection, Tile, Workload

CONFIG_FOLDERS = (
    "srt/layers/moe/moe_runner/triton_utils/configs",
    "srt/layers/moe/fused_moe_triton/configs",
)
KERNEL_SOURCES = (
    "kernels/ops/moe/fused_moe_triton_kernels.py",
    "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_kernels.py",
    "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py",
    "srt/layers/moe/fused_moe_triton/fused_moe.py",
)
CALLERS = tuple(f"{os.path.dirname(relative)}/{CALLER}" for relative in LOOKUP_SOURCES)


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
        names: a file name for each product, to the letter; "" for one that has no file of its own in this release.
        found: where the first file was found.
        paths: the files that SGLang would read, None where it finds none.
    """

    folder: str
    names: tuple[str, ...]
    found: Found
    paths: tuple[Path | None, ...]

    @property
    def without_files(self) -> Lookup:
        """The same names, and nothing found."""
        return replace(self, paths=(None,) * len(self.paths))

    @property
    def gate_up(self) -> str:
        """The gate-up file's name (an MoE layer only)."""
        return self.names[0]

    @property
    def down(self) -> str:
        """The down file's name, "" where there is none of its own (an MoE layer only)."""
        return self.names[1]

    @property
    def gate_up_path(self) -> Path | None:
        """The gate-up file (an MoE layer only)."""
        return self.paths[0]

    @property
    def down_path(self) -> Path | None:
        """The down file (an MoE layer only)."""
        return self.paths[1]


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


_NVIDIA = "E=*device_name=NVIDIA*.json"

_PROBE = Workload(8, 512, 1024, 2)
_ANY_CARD = Card("any card", (9, 0), 1 << 20, 0)
"""Where SGLang looks depends neither on the layer nor on the card."""


@dataclass(frozen=True)
class Tree:
    """One SGLang package folder (the one that holds `srt/`).

    Attributes:
        package: the folder.
        version: SGLang's version ("0.5.17").
        triton: the Triton version that names the folder of tuning files.
        ignored: tuning files to look past: they are bad and could not be moved away (`fixer.artefacts.check_files`).
        nearest: gives the tree of the nearest known release, to guess by where this one's look-up is not known.
    """

    package: Path
    version: str
    triton: str
    ignored: frozenset[Path] = frozenset()
    nearest: Callable[[], Tree] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def release(self) -> str:
        """The release whose rules hold: the version, or for one that says nothing what the tree's files place it as."""
        return placed(self.package, self.version)

    @cached_property
    def own_lookup(self) -> OwnLookup:
        """The release's own look-up, cut out; for a form that is not known the nearest release's, marked as a guess.

        Raises:
            UnknownFormError: it is not of a form that moefix knows, and there is no other to guess by.
        """
        try:
            own = OwnLookup.of(self.package)
            own.ask(_PROBE, self._world(_ANY_CARD)).rows(1)
        except UnknownFormError as fault:
            return self._guess(fault)
        except LookupStopsError as fault:  # and without a single file
            return self._guess(UnknownFormError(lookup_source(self.package), fault.message))
        return own

    def _guess(self, fault: UnknownFormError) -> OwnLookup:
        if self.nearest is None:
            raise fault
        place = lookup_source(self.package)
        try:
            other = self.nearest()
            own = OwnLookup.of(other.package)
        except SGLangError:
            raise fault from None
        return replace(own, place=place, guess=f"{fault.message} Guessed by the rules of SGLang {other.version}.")

    @property
    def guess(self) -> str:
        """ "" where the look-up is the tree's own; else what in it is not known, and by whose rules is guessed."""
        return self.own_lookup.guess

    def _world(self, card: Card, files: Files | None = None, **more: Any) -> World:
        return World(card, self.triton, Chosen({}) if files is None else files, **more)

    def _probe(self, **more: Any) -> Asking:
        """Asked for any layer on any card: where SGLang looks, and for how many files."""
        asking = self.own_lookup.ask(_PROBE, self._world(_ANY_CARD, **more))
        asking.rows(1)
        return asking

    @cached_property
    def triton_folder(self) -> Path:
        """Where SGLang looks first, honouring SGLANG_MOE_CONFIG_DIR as the release does; it need not exist yet.

        The running Triton's folder, but for 0.4.6, which has one folder for all.
        """
        return self._probe().folder

    @cached_property
    def configs(self) -> Path:
        """The folder `configs` that holds all tuning files, SGLang's own or the one of SGLANG_MOE_CONFIG_DIR."""
        return _up_to_configs(self.triton_folder)

    @cached_property
    def shipped_configs(self) -> Path:
        """The folder of the tuning files in the package itself."""
        return _up_to_configs(self._probe(environ={}).folder)

    @cached_property
    def reads_down_file(self) -> bool:
        """The down projection has a file of its own (up to 0.5.4.post1 there is one joint file)."""
        return self._probe().down != ""

    @cached_property
    def reads_config_dir_variable(self) -> bool:
        """SGLANG_MOE_CONFIG_DIR is honoured (from 0.5.3)."""
        elsewhere = os.path.abspath(os.sep + "elsewhere")
        return self._probe(environ={CONFIG_DIR_VARIABLE: elsewhere}).folder.is_relative_to(elsewhere)

    @cached_property
    def takes_gate_up_tma(self) -> bool:
        """USE_TMA may stand in a gate-up file (from 0.5.18; before, it reaches a kernel without such an argument)."""
        row = Tile(16, 32, 64, 1, 4, 3, use_tma=True).to_json()
        files = Chosen({self._probe().gate_up: Path()})
        asking = self.own_lookup.ask(_PROBE, self._world(_ANY_CARD, files, content=json.dumps({"1": row})))
        return not asking.rows(1).leaves_tma

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
    def takes_descriptors(self) -> frozenset[Projection]:
        """The projections whose file may ask for tensor descriptors: down in 0.5.17, both from 0.5.18.

        Of the down file it is read off the layer's source: it takes USE_TMA out before the kernel gets the rest.
        """
        path = next((self.package / name for name in CALLERS if (self.package / name).is_file()), None)
        try:
            source = ast.parse(path.read_text("utf-8") if path is not None else "")
        except (OSError, SyntaxError, UnicodeDecodeError):
            return frozenset()
        calls = [node for node in ast.walk(source) if isinstance(node, ast.Call)]
        taken = {ast.unparse(call.func) for call in calls if call.args and ast.unparse(call.args[0]) == "'USE_TMA'"}
        down = {Projection.DOWN} if "down_config.pop" in taken else set[Projection]()
        return frozenset(down | ({Projection.GATE_UP} if self.takes_gate_up_tma else set()))

    def file_name(self, workload: Workload, card: Card, projection: Projection) -> str:
        """The tuning file's name to the letter; "" where this release reads none for the projection."""
        asking = self.own_lookup.ask(workload, self._world(card))
        asking.rows(1)
        return asking.down if projection is Projection.DOWN else asking.gate_up

    def lookup(self, workload: Workload, card: Card, *, without_moefix: bool = False) -> Lookup:
        """Follow SGLang's search, by its own functions.

        Args:
            without_moefix: look past what moefix installed, as if it had never run: the file that was there before,
                or none.

        Raises:
            UnknownFormError: the look-up is not of a form that moefix knows.
            LookupStopsError: SGLang's own search ends in an error.
        """
        asking = self.own_lookup.ask(workload, self._world(card, Disk(self.ignored, without_moefix)))
        asking.rows(1)
        folder, up_path = asking.folder, asking.opened(asking.gate_up)
        found = Found.NONE
        if up_path is not None:
            found = Found.SHIPPED if up_path.parent == folder else Found.OTHER_TRITON
        return Lookup(
            folder.relative_to(_up_to_configs(folder).parent).as_posix(),
            (asking.gate_up, asking.down),
            found,
            (up_path, asking.opened(asking.down)),
        )

    def deterministic_tile(self, workload: Workload, card: Card) -> Tile:
        """What `--enable-deterministic-inference` runs for every M."""
        asking = self.own_lookup.ask(workload, self._world(card, deterministic=True))
        return Tile.from_json(asking.rows(1).gate_up)

    def shipped_files(self) -> Iterator[TuningFile]:
        """Every tuning file for an NVIDIA card that SGLang ships and that can be read, in a stable order."""
        configs = self.shipped_configs
        for path in sorted((*configs.glob(_NVIDIA), *configs.glob("triton_*/" + _NVIDIA))):
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


def _up_to_configs(folder: Path) -> Path:
    return next((each for each in (folder, *folder.parents) if each.name == "configs"), folder)


def check_rows(path: Path | None) -> None:
    """Raise SGLangError for a tuning file that SGLang would read and fail over."""
    try:
        if path is not None:
            read_rows(path)
    except ValueError as error:
        raise SGLangError(
            f"SGLang would read {path} and fail: {error}.", "Move that file away, or tune again with --fresh."
        ) from error
