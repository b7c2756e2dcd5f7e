"""Where moefix keeps what it learns: the data folder, and a temporary one where that cannot be written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fixer.base.errors import StoreError
from fixer.base.files import HOME_HINT, make_folder, store_error


def data_home(chosen: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The data folder, made if need be and proven writable.

    `chosen` (--moefix-home) comes first, then MOEFIX_HOME, then /data in moefix's image (MOEFIX_IMAGE=1), then
    $XDG_DATA_HOME/moefix, by default ~/.local/share/moefix.

    Raises:
        StoreError: the folder cannot be made or written.
    """
    home = wanted_home(chosen, environ)
    make_folder(home)
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as fault:
        raise store_error(f"the data folder {home} cannot be written", fault) from fault
    return home


def wanted_home(chosen: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the data folder is to be; nothing is made.

    Raises:
        StoreError: this user has no home folder, and none is named.
    """
    try:
        if chosen or environ.get("MOEFIX_HOME"):
            return Path(chosen or environ["MOEFIX_HOME"]).expanduser().absolute()
        if environ.get("MOEFIX_IMAGE") == "1":
            return Path("/data")
        shared = environ.get("XDG_DATA_HOME", "")
        # The XDG specification has a relative path ignored.
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".local" / "share"
        return base / "moefix"
    except RuntimeError as fault:
        raise StoreError(f"there is no home folder for this user ({fault})", HOME_HINT) from fault


def passing_folder() -> Path:
    """A folder that goes when this process ends, but not when it becomes the server, which may need what is in it.

    Raises:
        OSError: there is no place for one.
    """
    folder = Path(tempfile.mkdtemp(prefix="moefix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SCRATCH_BYTES = 16 << 20
"""What a plan's compiled kernels need of the data folder."""


def scratch_in(home: Path) -> Path:
    """The data folder if it has space for compiled kernels, else a passing one.

    Raises:
        OSError: there is no place for one.
    """
    return home if shutil.disk_usage(home).free >= SCRATCH_BYTES else passing_folder()
