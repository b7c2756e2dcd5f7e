"""Puts tuned files where SGLang looks for them, and reads such files back.

SGLang reads `<root>/configs/<folder>/<name>.json`, by exact name, where <root> is its own package or, in its place and
not on top of it, what the family's environment variable names (SGLANG_MOE_CONFIG_DIR: fused_moe_triton_config.py,
get_moe_configs). So a backup beside a file is never read, and an overlay has to hold everything that SGLang ships.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.overlay import mirror_shipped
from fixer.base.data_folder import DataFolder
from fixer.base.errors import StoreError
from fixer.base.files import (
    Damaged,
    read_bounded,
    read_or_set_aside,
    safe_name,
    set_aside,
    write_atomically,
    write_together,
)
from fixer.families.family import Family
from fixer.sglang.lookup import BEFORE_MOEFIX
from fixer.workload import RowTiles, Tile

BACKUP_SUFFIX = BEFORE_MOEFIX


@dataclass(frozen=True)
class TunedFiles:
    """The tuning files of one workload: one for each product of its family, or a joint one.

    Attributes:
        family: the kernel family, which says what a row may be.
        names: SGLang's name for each product's file; "" for one that has none of its own: the release then reads the
            first product's file for it, and both tables must be the same.
        tables: for each product a tile for each batch size M in tokens, all for the same M.
        sglang: the release that will read them; "" for any.

    Raises:
        ValueError: on construction, where that does not hold or a row is absurd: an error in moefix itself.
    """

    family: Family
    names: tuple[str, ...]
    tables: tuple[Mapping[int, Tile], ...]
    sglang: str = ""

    def __post_init__(self) -> None:
        self.family.check_names(self.names)
        first = self.tables[0]
        for name, table in zip(self.names, self.tables, strict=True):
            if not table or table.keys() != first.keys():
                raise ValueError(f"the rows differ: {sorted(first)} and {sorted(table)}")
            if not name and table != first:
                raise ValueError(f"{self.names[0]} is one file for several products, and their tiles differ")
        for batch in first:
            if batch < 1:
                raise ValueError(f"row {batch} is no batch size")
            try:
                self.family.check_row(RowTiles(*(table[batch] for table in self.tables)), self.sglang)
            except ValueError as error:
                raise ValueError(f"row {batch}: {error}") from error

    def files(self, folder: Path) -> tuple[tuple[Path, bytes], ...]:
        """The files in a folder, each with its content."""
        named = zip(self.names, self.tables, strict=True)
        return tuple((folder / name, self.family.render(table)) for name, table in named if name)

    @classmethod
    def of(cls, artefact: Artefact) -> TunedFiles:
        """An artefact's files."""
        rows = {row.batch: row.tiles for row in artefact.rows}
        return cls.from_rows(artefact.family, artefact.files, rows, artefact.environment.sglang)

    @classmethod
    def from_rows(
        cls, family: Family, names: tuple[str, ...], rows: Mapping[int, RowTiles], sglang: str = ""
    ) -> TunedFiles:
        """The files that hold these rows."""
        tables = tuple({batch: row.of(product) for batch, row in rows.items()} for product in family.products)
        return cls(family, names, tables, sglang)


@dataclass(frozen=True)
class Installation:
    """Where tuned files are now, and what SGLang needs to find them.

    Attributes:
        folder: the folder that holds them (for an MoE layer the running Triton's).
        paths: each product's file; the first one's for a product that has none of its own.
        env: environment variables that SGLang has to be started with; none where the files are in its own tree.
        notes: what was done that a person may want to know, one line each.
    """

    folder: Path
    paths: tuple[Path, ...]
    env: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        first, *others = dict.fromkeys(self.paths)
        return " and ".join([str(first), *(path.name for path in others)])


def installed(folder: Path, files: TunedFiles) -> bool:
    """Whether the files are in `folder`, byte for byte."""
    return all(_content(path) == content for path, content in files.files(folder))


def install_files(
    folder: Path, files: TunedFiles, home: Path, sglang_version: str, *, overlay: bool = True
) -> Installation:
    """Put the files into `folder`, or into an overlay in the data folder where `folder` cannot be written.

    A file that was there before and differs is kept once as `<name>.before-moefix`; an empty one of that name says
    that there was none. Later, one that moefix did not write is kept as `<name>.replaced-<UTC>`. A damaged one is set
    aside.

    Args:
        folder: the folder that SGLang reads (`Family.folder`): for an MoE layer `<root>/configs/triton_3_6_0`, <root>
            being SGLang's own or what the user has in SGLANG_MOE_CONFIG_DIR. It need not exist.
        files: what to put there.
        home: moefix's data folder.
        sglang_version: names the overlay.
        overlay: this SGLang reads the family's environment variable, so that an overlay helps (`Family.reads_overlay`).

    Returns:
        Where they are. Where they were there already, nothing is written.

    Raises:
        StoreError: neither the folder nor the data folder can be written, or an overlay would not be read.
    """
    if installed(folder, files):
        return _installation(folder, files)
    try:
        notes = _write(folder, files, home)
    except StoreError as fault:
        if not overlay:
            raise StoreError(
                f"{fault.message}; SGLang {sglang_version} reads its tuning files from there only", fault.hint
            ) from fault
        return _install_overlay(folder, files, home, safe_name(sglang_version), fault.message)
    return _installation(folder, files, notes=notes)


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
    folder: Path, files: TunedFiles, env: tuple[tuple[str, str], ...] = (), notes: tuple[str, ...] = ()
) -> Installation:
    return Installation(folder, tuple(folder / (name or files.names[0]) for name in files.names), env, notes)


def _content(path: Path) -> bytes | None:
    try:
        return read_bounded(path)
    except (OSError, ValueError):
        return None


def _write(folder: Path, files: TunedFiles, home: Path) -> tuple[str, ...]:
    return _replace(folder, files, home, overlay=False)


def _replace(folder: Path, files: TunedFiles, home: Path, *, overlay: bool) -> tuple[str, ...]:
    """Keep what is there, write the files, and remember that moefix wrote it."""
    written = files.files(folder)
    parse = files.family.parser()
    notes = tuple(note for path, content in written for note in _make_room(path, content, parse, home, overlay))
    write_together(written)
    for _, content in written:
        with contextlib.suppress(StoreError):  # at worst later files keep this one as if it were another's
            write_atomically(_mark(home, content), b"")
    return notes


def _mark(home: Path, content: bytes) -> Path:
    """An empty file of this name in the data folder says that moefix wrote that content."""
    return DataFolder(home).written / hashlib.sha256(content).hexdigest()


def _make_room(path: Path, new: bytes, parse: Callable[[bytes], Any], home: Path, overlay: bool) -> tuple[str, ...]:
    """Keep what is at `path`, unless moefix wrote it, before `new` takes its place; an overlay's links are no files.

    Raises:
        StoreError: it cannot be kept.
    """
    if path.is_dir() or (overlay and path.is_symlink()):
        return ()
    old, why = _usable(path, parse)
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


def _usable(path: Path, parse: Callable[[bytes], Any]) -> tuple[bytes | None, str]:
    """The content of a tuning file, None for none; and why it is none that SGLang could read, "" where it is."""
    try:
        content = read_bounded(path)
        parse(content)
    except FileNotFoundError:
        return None, ""
    except OSError as fault:
        return None, fault.strerror or "it cannot be read"
    except ValueError as fault:
        return None, str(fault)
    return content, ""


# --- the overlay -----------------------------------------------------------------------------------------------------


def _install_overlay(folder: Path, files: TunedFiles, home: Path, name: str, reason: str) -> Installation:
    root = DataFolder(home).overlay / name
    own = root / "configs" / folder.name
    try:
        mirror_shipped(folder, own)
    except OSError as fault:
        raise StoreError(
            f"SGLang's files cannot be mirrored to {own}: {fault.strerror or fault}",
            "Make SGLang's folder or the data folder writable, with some space free.",
        ) from fault
    notes = () if installed(own, files) else _replace(own, files, home, overlay=True)
    note = f"SGLang's own folder was left as it is ({reason}); the tuned files are in {own}"
    return _installation(own, files, ((files.family.overlay_variable, str(root)),), (*notes, note))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilesOnDisk:
    """What SGLang would find under some files' names.

    Attributes:
        tables: for each product a tile for each M; None where there is no file, or a damaged one.
        damaged: the files that could not be used, for the caller to report.
    """

    tables: tuple[Mapping[int, Tile] | None, ...]
    damaged: tuple[Damaged, ...]


def read_files(folder: Path, family: Family, names: tuple[str, ...]) -> FilesOnDisk:
    """Read a family's files, whatever state they are in. A damaged one is moved aside and reported.

    Whether the tiles fit the card is not looked at here: that takes the compiler.

    Raises:
        ValueError: a name is no plain file name.
    """
    family.check_names(names)
    read = [
        read_or_set_aside(folder / (name or names[0]), family.parser(product))
        for product, name in zip(family.products, names, strict=True)
    ]
    return FilesOnDisk(tuple(table for table, _ in read), tuple(report for _, report in read if report))
