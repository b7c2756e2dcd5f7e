"""Write files whole or not at all, and set damaged ones aside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from fixer.base.errors import StoreError
from fixer.base.file_name import FileName

HOME_HINT = "Set MOEFIX_HOME (or --moefix-home) to a folder that this user can write."


def store_error(what: str, fault: OSError | ValueError) -> StoreError:
    """The error for a file that could not be read or written, with what to do about the data folder."""
    code = fault.errno if isinstance(fault, OSError) else None
    reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(f"{what}: {reason}", "Free some space there, or: " + HOME_HINT if full else HOME_HINT)


FILE_MODE, FOLDER_MODE = 0o644, 0o755


_LEFTOVER_SECONDS = 3600


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, mode 0755, owned as the nearest existing parent is (where root makes them).

    Raises:
        StoreError: it cannot be made, or something that is no folder is in the way.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            _make_one_folder(path)
    except (OSError, ValueError) as fault:
        raise store_error(f"the folder {folder} cannot be made", fault) from fault


def _make_one_folder(path: Path) -> None:
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return  # another process was quicker
    with contextlib.suppress(OSError):  # not every mounted file system has modes
        path.chmod(FOLDER_MODE)
    take_owner_of(path.parent, path)


def take_owner_of(folder: Path, target: Path | int) -> None:
    """Give `target` (a path, itself if it is a link, or an open file) the owner of `folder`, if this process is root.

    So a user's mounted volume does not fill with root's files.
    """
    if os.geteuid() != 0:
        return
    # Without CAP_CHOWN, or on a file server that maps root to nobody, root's own name has to do.
    with contextlib.suppress(OSError):
        owner = folder.stat()
        if isinstance(target, int):
            os.fchown(target, owner.st_uid, owner.st_gid)
        else:
            os.lchown(target, owner.st_uid, owner.st_gid)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all: whatever dies when, a reader sees the old bytes or the new.

    The file gets mode 0644 and, where root writes into another user's folder, that user as its owner. The folder is
    made if need be.

    Raises:
        StoreError: it cannot be written; what was at `path` is untouched.
    """
    write_together(((path, content),))


def write_together(files: Sequence[tuple[Path, bytes]]) -> None:
    """Put each content at its path, after all of them are safe on the disk: a full disk changes none of the files.

    Each file changes in one step; a crash between two steps leaves some new and some old.

    Raises:
        StoreError: one cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files:
            make_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder is in the way", str(path))
            staged.append((_stage(path, content), path))
        for temporary, path in staged:
            os.replace(temporary, path)
        for folder in {path.parent for path, _ in files}:
            _sync_folder(folder)
    except (OSError, ValueError) as fault:
        raise store_error(f"{' and '.join(str(path) for path, _ in files)} cannot be written", fault) from fault
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    """A finished temporary file beside `path`. The random name keeps two containers, both process 1, apart."""
    prefix = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"
    handle, name = tempfile.mkstemp(".tmp", prefix, path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # not every mounted file system has modes
                os.fchmod(handle, FILE_MODE)
            take_owner_of(path.parent, handle)
            file.write(content)
            file.flush()
            os.fsync(handle)
            now = os.fstat(handle).st_mtime
        _remove_leftovers(path.parent, prefix, now)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _remove_leftovers(folder: Path, prefix: str, now: float) -> None:
    """Remove what a killed writer of the same file left. Both times are the file system's, so clocks do not matter."""
    for leftover in folder.glob(f"{prefix}*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to sync a folder; the rename is done all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


MOST_BYTES = 1 << 20
"""No file of moefix or SGLang's tuning comes near 1 MiB (SGLang's longest has 15 KiB)."""


@dataclass(frozen=True)
class Damaged:
    """A file that could not be used.

    Attributes:
        path: where it was.
        kept_as: where it is now; None if it could not be moved and is still at `path`.
        reason: what is wrong with it, in one line.
    """

    path: Path
    kept_as: Path | None
    reason: str

    def __str__(self) -> str:
        fate = f"kept as {self.kept_as.name}" if self.kept_as else "it could not be moved aside"
        return f"{self.path} is not used: {self.reason} ({fate})"


def read_bounded(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most_bytes`; a pipe or a device under that name does not block.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or longer.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    return content


def set_aside(path: Path, reason: str, label: str = "damaged") -> Damaged:
    """Move a damaged file to `<name>.damaged-<UTC>` beside it, over no other file. Never raises, never deletes."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    shown = reason if len(reason) <= 200 else reason[:197] + "..."
    for attempt in range(100):
        target = path.with_name(f"{path.name}.{label}-{stamp}" + (f"-{attempt}" if attempt else ""))
        if os.path.lexists(target):
            continue
        try:
            path.rename(target)
        except OSError:
            break
        return Damaged(path, target, shown)
    return Damaged(path, None, shown)


def check_file_name(name: str) -> str:
    """The name itself, if it is a plain .json file's: no folder in it, not hidden, printable, at most 200 bytes.

    The rest of the 255 bytes is for the endings that moefix appends, such as `.before-moefix`.

    Raises:
        ValueError: it is not.
    """
    with contextlib.suppress(ValueError):
        FileName(name)
        if name.endswith(".json") and not name.startswith(".") and len(os.fsencode(name)) <= 200:
            return name
    raise ValueError(f"{name[:80]!r} is no name for a tuning file")


_T = TypeVar("_T")


def utc_now() -> str:
    """The time as an artefact writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def safe_name(text: str) -> str:
    """`text` as one component of a path: letters, digits and `._=,+-` only, not hidden, at most 100 characters."""
    return re.sub(r"[^A-Za-z0-9._=,+-]", "_", text).lstrip(".")[:100] or "unnamed"


def read_or_set_aside(path: Path, parse: Callable[[bytes], _T]) -> tuple[_T | None, Damaged | None]:
    """What `parse` makes of a file; where it raises ValueError the file is moved aside. Neither for one not there."""
    try:
        return parse(read_bounded(path)), None
    except FileNotFoundError:
        return None, None
    except OSError as fault:
        # It may be readable tomorrow, or by another user: left where it is.
        return None, Damaged(path, None, fault.strerror or "it cannot be read")
    except ValueError as fault:
        return None, set_aside(path, str(fault))
