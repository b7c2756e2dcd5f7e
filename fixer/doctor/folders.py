"""Checks of the data folder, the caches, shared memory and the disk."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fixer.doctor.examine import Finding, Patient, State
from fixer.doctor.sglang import is_writable
from fixer.model.hub import hub_cache

SHM = "/dev/shm"  # noqa: S108 (that very folder)


ENOUGH_SHM = 1 << 30
"""Bytes of /dev/shm: Docker's default of 64 MiB is too small for NCCL and for SGLang's processes among themselves."""


LITTLE_DISK, TOO_LITTLE_DISK = 2 << 30, 128 << 20
"""Bytes free for the data folder: Triton's caches of one model take some hundred MiB."""


LITTLE_HUB_DISK = 30 << 30
"""Bytes free for weights that are not there yet."""


MOST_ENTRIES = 20000
"""Files of a folder whose owner is looked at."""


def look_at_home(patient: Patient) -> Iterator[Finding]:
    """The data folder can be written, and its files have its owner."""
    home = patient.home
    if not is_writable(home):
        yield Finding(
            "data folder",
            State.FAILURE,
            f"{home} cannot be written by user {os.geteuid()}",
            f"chown it to that user, or set MOEFIX_HOME: {_chown(home, os.geteuid(), os.getegid())}",
        )
    else:
        yield Finding("data folder", State.OK, f"{home} can be written" + ("" if home.is_dir() else " (not made yet)"))
    yield from _owners("data folder", home)
    aside = [path.name for path in _walk(home) if ".damaged-" in path.name]
    if aside:
        yield Finding(
            "data folder",
            State.WARNING,
            f"{len(aside)} damaged files were set aside there: {aside[0]}",
            "Remove them when you need them no more; many of them hint at a bad disk.",
        )


def look_at_caches(patient: Patient) -> Iterator[Finding]:
    """The hub's and Triton's caches can be written by this user."""
    for name, folder in _caches():
        if is_writable(folder):
            yield Finding(name, State.OK, f"{folder} can be written")
        else:
            yield Finding(
                name,
                State.FAILURE,
                f"{folder} cannot be written by user {os.geteuid()}",
                f"{_chown(folder, os.geteuid(), os.getegid())}, or name another folder with {_VARIABLES[name]}.",
            )
        yield from _owners(name, folder)


_VARIABLES = {"hub cache": "HF_HOME", "Triton's cache": "TRITON_CACHE_DIR"}


def _caches() -> tuple[tuple[str, Path], ...]:
    from fixer.kernel.cache import server_triton_cache

    return (("hub cache", hub_cache()), ("Triton's cache", server_triton_cache()))


def _owners(name: str, folder: Path) -> Iterator[Finding]:
    """Files of another user than the folder's, as an image that ran as root leaves them in a mounted folder."""
    try:
        owner = folder.stat()
    except OSError:
        return
    strange = [path for path in _walk(folder) if _uid(path) not in (owner.st_uid, None)]
    if strange:
        users = ", ".join(sorted({"root" if _uid(path) == 0 else f"user {_uid(path)}" for path in strange}))
        yield Finding(
            name,
            State.WARNING,
            f"{len(strange)} files in {folder} belong to {users}, and the folder to user {owner.st_uid}:"
            f" {strange[0].name}",
            _chown(folder, owner.st_uid, owner.st_gid),
        )


def _chown(folder: Path, uid: int, gid: int) -> str:
    return f"sudo chown -R {uid}:{gid} {folder}"


def _uid(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def _walk(folder: Path) -> list[Path]:
    paths = (Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))
    return list(itertools.islice(paths, MOST_ENTRIES))


def look_at_shm(patient: Patient) -> Iterator[Finding]:
    """The memory that processes share is large enough."""
    try:
        found = os.statvfs(SHM)
    except OSError as fault:
        yield Finding(SHM, State.WARNING, f"not there: {fault.strerror}", "Mount a tmpfs there.")
        return
    size = found.f_frsize * found.f_blocks
    if size < ENOUGH_SHM:
        yield Finding(
            SHM,
            State.WARNING,
            f"{size >> 20} MiB; SGLang with more than one card needs more",
            "docker run --ipc host, or --shm-size 16g.",
        )
    else:
        yield Finding(SHM, State.OK, f"{size >> 20} MiB")


def look_at_disk(patient: Patient) -> Iterator[Finding]:
    """There is room for what is kept, and for weights."""
    for name, folder, little in (
        ("data folder", patient.home, LITTLE_DISK),
        ("hub cache", _caches()[0][1], LITTLE_HUB_DISK),
    ):
        there = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if there is None:
            continue
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB are free for the {name}"
        if free < TOO_LITTLE_DISK:
            yield Finding("disk", State.FAILURE, text, f"Free some space on the file system of {there}.")
        elif free < little:
            yield Finding("disk", State.WARNING, text, f"Weights or caches may not fit: free some space at {there}.")
        else:
            yield Finding("disk", State.OK, text)
