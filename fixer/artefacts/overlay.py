"""A copy of SGLang's configuration folder made of links, for trees that cannot be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fixer.base.files import make_folder, take_owner_of


def mirror_shipped(folder: Path, own: Path) -> None:
    """Have all that SGLang ships in the overlay: other Triton versions' folders as links, the running one's files."""
    overlay = own.parent
    if own.is_symlink():
        # Mirrored as a whole while another Triton version was the running one.
        own.unlink()
    make_folder(own)
    for entry in _entries(folder.parent):
        if entry.name.startswith("triton_") and entry.name != folder.name:
            _mirror(entry, overlay / entry.name)
    for entry in _entries(folder):
        if entry.suffix == ".json":
            _mirror(entry, own / entry.name)
    _drop_dead_links(overlay)
    _drop_dead_links(own)


def _entries(folder: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted(folder.iterdir()))
    except OSError:
        return ()


def _mirror(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, or a copy where the file system has no links. Own files stay as they are."""
    wanted = str(source.absolute())
    if target.is_symlink():
        if os.readlink(target) == wanted:
            return
        target.unlink(missing_ok=True)
    elif target.exists():
        return
    try:
        target.symlink_to(wanted)
        take_owner_of(target.parent, target)
    except FileExistsError:
        return  # another process was quicker
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def _drop_dead_links(folder: Path) -> None:
    for entry in _entries(folder):
        if entry.is_symlink() and not entry.exists():
            entry.unlink(missing_ok=True)
