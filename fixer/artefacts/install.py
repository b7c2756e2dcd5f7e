"""Puts a tuned pair of files where SGLang looks for it, and reads such pairs back.

SGLang reads `<root>/configs/triton_<version>/<name>.json`, by exact name, where <root> is its own package or, in its
place and not on top of it, SGLANG_MOE_CONFIG_DIR (fused_moe_triton_config.py, get_moe_configs). So a backup beside a
file is never read, and an overlay has to hold everything that SGLang ships.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fixer.artefacts.artefact import Artefact, gate_up_may_describe
from fixer.artefacts.overlay import mirror_shipped
from fixer.base.data_folder import DataFolder
from fixer.base.errors import StoreError
from fixer.base.files import (
    Damaged,
    check_file_name,
    read_bounded,
    read_or_set_aside,
    safe_name,
    set_aside,
    write_atomically,
    write_together,
)
from fixer.sglang.lookup import BEFORE_MOEFIX, CONFIG_DIR_VARIABLE
from fixer.sglang.tuning_files import parse_table, render_table
from fixer.workload import Tile, check_tile

OVERLAY_VARIABLE = CONFIG_DIR_VARIABLE
BACKUP_SUFFIX = BEFORE_MOEFIX


@dataclass(frozen=True)
class Pair:
    """The two tuning files of one workload, or the joint one of a release that reads one for both projections.

    Attributes:
        gate_up_name, down_name: SGLang's names for the files; `down_name` is "" where it reads one joint file.
        gate_up, down: a tile for each batch size M in tokens, both for the same M, each two sharing BLOCK_SIZE_M
            (SGLang sorts tokens into blocks once for both, and would overrule the down projection's).
        gate_up_may_describe: the release takes USE_TMA in a gate-up file.

    Raises:
        ValueError: on construction, where that does not hold or a tile is absurd: an error in moefix itself.
    """

    gate_up_name: str
    down_name: str
    gate_up: Mapping[int, Tile]
    down: Mapping[int, Tile]
    gate_up_may_describe: bool = False

    def __post_init__(self) -> None:
        for name in filter(None, (self.gate_up_name, self.down_name)):
            check_file_name(name)
        if not self.down_name and self.gate_up != self.down:
            raise ValueError(f"one file {self.gate_up_name} cannot hold two tables")
        if self.gate_up_name == self.down_name:
            raise ValueError(f"both projections are to be written as {self.gate_up_name}")
        if not self.gate_up or self.gate_up.keys() != self.down.keys():
            raise ValueError(f"the rows differ: {sorted(self.gate_up)} and {sorted(self.down)}")
        for batch, tile in self.gate_up.items():
            if batch < 1 or check_tile(tile).block_m != check_tile(self.down[batch]).block_m:
                raise ValueError(f"row {batch}: {tile} and {self.down[batch]} differ in BLOCK_SIZE_M")
            if tile.use_tma and not self.gate_up_may_describe:
                raise ValueError(f"row {batch}: USE_TMA breaks SGLang 0.5.17 in a gate_up file")

    def files(self, folder: Path) -> tuple[tuple[Path, bytes], ...]:
        """The files in a folder, each with its content."""
        return tuple((folder / name, render_table(table)) for name, table in self.tables.items())

    @property
    def tables(self) -> dict[str, Mapping[int, Tile]]:
        """What each file holds, by its name: two, or one joint file."""
        both = {self.gate_up_name: self.gate_up, self.down_name: self.down}
        return {name: table for name, table in both.items() if name}

    @classmethod
    def of(cls, artefact: Artefact) -> Pair:
        """An artefact's files."""
        return cls(
            artefact.gate_up_file,
            artefact.down_file,
            {row.batch: row.gate_up for row in artefact.rows},
            {row.batch: row.down for row in artefact.rows},
            gate_up_may_describe(artefact.environment.sglang),
        )


@dataclass(frozen=True)
class Installation:
    """Where a pair is now, and what SGLang needs to find it.

    Attributes:
        folder: the triton_* folder that holds the pair.
        gate_up_path, down_path: the files; one and the same for a release that reads one joint file.
        env: environment variables that SGLang has to be started with; none where the pair is in its own tree.
        notes: what was done that a person may want to know, one line each.
    """

    folder: Path
    gate_up_path: Path
    down_path: Path
    env: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if self.down_path == self.gate_up_path:
            return str(self.gate_up_path)
        return f"{self.gate_up_path} and {self.down_path.name}"


def installed(folder: Path, pair: Pair) -> bool:
    """Whether the files are in `folder`, byte for byte."""
    return all(_content(path) == content for path, content in pair.files(folder))


def install_pair(folder: Path, pair: Pair, home: Path, sglang_version: str, *, overlay: bool = True) -> Installation:
    """Put the pair into `folder`, or into an overlay in the data folder where `folder` cannot be written.

    A file that was there before and differs is kept once as `<name>.before-moefix`; an empty one of that name says
    that there was none. Later, one that moefix did not write is kept as `<name>.replaced-<UTC>`. A damaged one is set
    aside.

    Args:
        folder: the running Triton's folder that SGLang reads: `<root>/configs/triton_3_6_0`, <root> being SGLang's
            own or what the user has in SGLANG_MOE_CONFIG_DIR. It need not exist.
        pair: the pair.
        home: moefix's data folder.
        sglang_version: names the overlay.
        overlay: this SGLang reads SGLANG_MOE_CONFIG_DIR, so that an overlay helps (`Tree.reads_config_dir_variable`).

    Returns:
        Where the pair is. Where it was there already, nothing is written.

    Raises:
        StoreError: neither the folder nor the data folder can be written, or an overlay would not be read.
    """
    if installed(folder, pair):
        return _installation(folder, pair)
    try:
        notes = _write_pair(folder, pair, home)
    except StoreError as fault:
        if not overlay:
            raise StoreError(
                f"{fault.message}; SGLang {sglang_version} reads its tuning files from there only", fault.hint
            ) from fault
        return _install_overlay(folder, pair, home, safe_name(sglang_version), fault.message)
    return _installation(folder, pair, notes=notes)


def write_beside(files: Sequence[tuple[Path, bytes]], home: Path | None = None) -> tuple[str, ...]:
    """Write files into a folder of the user's; what differs there is kept under another name, unless moefix wrote it.

    The copy is `<name>.before-moefix`, or, where that is taken, `<name>.before-moefix-2` and so on.

    Args:
        files: paths and contents.
        home: the data folder, which remembers what moefix wrote; None where that is not known.

    Returns:
        A note for each copy.

    Raises:
        StoreError: a file cannot be kept or written; then none is changed.
    """
    notes = tuple(note for path, content in files for note in _keep_copy(path, content, home))
    write_together(files)
    if home is not None:
        with contextlib.suppress(OSError):  # at worst a later export keeps this one as if it were another's
            for _, content in files:
                mark = _mark(home, content)
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
    return notes


def _keep_copy(path: Path, new: bytes, home: Path | None) -> tuple[str, ...]:
    old = _content(path)
    if path.is_dir() or not path.exists() or old == new:
        return ()
    if old is not None and home is not None and _mark(home, old).exists():
        return ()
    ends = (BACKUP_SUFFIX, *(f"{BACKUP_SUFFIX}-{number}" for number in range(2, 100)))
    for copy in (path.with_name(path.name + end) for end in ends):
        if old is not None and _content(copy) == old:
            return ()
        if not os.path.lexists(copy):
            break
    else:
        raise StoreError(f"{path} has 99 copies beside it", "Move them away, or name another folder.")
    try:
        shutil.copyfile(path, copy)
    except OSError as fault:
        raise StoreError(f"{path} cannot be kept as {copy.name}: {fault.strerror or fault}", "Move it away.") from fault
    return (f"the {path.name} that was there is kept as {copy.name}",)


def _installation(
    folder: Path, pair: Pair, env: tuple[tuple[str, str], ...] = (), notes: tuple[str, ...] = ()
) -> Installation:
    return Installation(folder, folder / pair.gate_up_name, folder / (pair.down_name or pair.gate_up_name), env, notes)


def _content(path: Path) -> bytes | None:
    try:
        return read_bounded(path)
    except (OSError, ValueError):
        return None


def _write_pair(folder: Path, pair: Pair, home: Path) -> tuple[str, ...]:
    return _replace(folder, pair, home, overlay=False)


def _replace(folder: Path, pair: Pair, home: Path, *, overlay: bool) -> tuple[str, ...]:
    """Keep what is there, write the pair, and remember that moefix wrote it."""
    files = pair.files(folder)
    notes = tuple(note for path, content in files for note in _make_room(path, content, home, overlay))
    write_together(files)
    for _, content in files:
        with contextlib.suppress(StoreError):  # at worst a later pair keeps this one as if it were another's
            write_atomically(_mark(home, content), b"")
    return notes


def _mark(home: Path, content: bytes) -> Path:
    """An empty file of this name in the data folder says that moefix wrote that content."""
    return DataFolder(home).written / hashlib.sha256(content).hexdigest()


def _make_room(path: Path, new: bytes, home: Path, overlay: bool) -> tuple[str, ...]:
    """Keep what is at `path`, unless moefix wrote it, before `new` takes its place; an overlay's links are no files.

    Raises:
        StoreError: it cannot be kept.
    """
    if path.is_dir() or (overlay and path.is_symlink()):
        return ()
    old, why = _usable(path)
    if old == new:
        return ()
    notes: tuple[str, ...] = ()
    if why:
        aside = set_aside(path, why)
        if aside.kept_as is None:
            raise StoreError(str(aside), "Move it away, or make its folder writable.")
        old, notes = None, (str(aside),)
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    if not overlay and not os.path.lexists(backup):
        write_atomically(backup, old or b"")
        notes += (f"the {path.name} that was there is kept as {backup.name}",) if old else ()
    elif old is not None and not _mark(home, old).exists():
        # A second backup of that name would hold moefix's own older file.
        aside = set_aside(path, "another took its place", "replaced")
        if aside.kept_as is None:
            raise StoreError(f"{path} cannot be kept under another name.", "Move it away.")
        notes += (f"the {path.name} that was there is kept as {aside.kept_as.name}",)
    return notes


def _usable(path: Path) -> tuple[bytes | None, str]:
    """The content of a tuning file, None for none; and why it is none that SGLang could read, "" where it is."""
    try:
        content = read_bounded(path)
        parse_table(content)
    except FileNotFoundError:
        return None, ""
    except OSError as fault:
        return None, fault.strerror or "it cannot be read"
    except ValueError as fault:
        return None, str(fault)
    return content, ""


# --- the overlay -----------------------------------------------------------------------------------------------------


def _install_overlay(folder: Path, pair: Pair, home: Path, name: str, reason: str) -> Installation:
    root = DataFolder(home).overlay / name
    own = root / "configs" / folder.name
    try:
        mirror_shipped(folder, own)
    except OSError as fault:
        raise StoreError(
            f"SGLang's files cannot be mirrored to {own}: {fault.strerror or fault}",
            "Make SGLang's folder or the data folder writable, with some space free.",
        ) from fault
    notes = () if installed(own, pair) else _replace(own, pair, home, overlay=True)
    note = f"SGLang's own folder was left as it is ({reason}); the pair is in {own}"
    return _installation(own, pair, ((OVERLAY_VARIABLE, str(root)),), (*notes, note))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairOnDisk:
    """What SGLang would find under the pair's two names.

    Attributes:
        gate_up, down: a tile for each M; None where there is no file, or a damaged one.
        damaged: the files that could not be used, for the caller to report.
    """

    gate_up: Mapping[int, Tile] | None
    down: Mapping[int, Tile] | None
    damaged: tuple[Damaged, ...]


def read_pair(folder: Path, gate_up_name: str, down_name: str) -> PairOnDisk:
    """Read the two files, whatever state they are in. A damaged one is moved aside and reported.

    Whether the tiles fit the card is not looked at here: that takes the compiler.

    Raises:
        ValueError: a name is no plain file name.
    """
    gate_up, gate_up_damaged = _read_table(folder / check_file_name(gate_up_name), tma=False)
    down, down_damaged = _read_table(folder / check_file_name(down_name), tma=True)
    return PairOnDisk(gate_up, down, tuple(report for report in (gate_up_damaged, down_damaged) if report))


def _read_table(path: Path, tma: bool) -> tuple[Mapping[int, Tile] | None, Damaged | None]:
    return read_or_set_aside(path, partial(parse_table, tma=tma))
