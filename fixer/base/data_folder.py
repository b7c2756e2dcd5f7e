"""Where moefix keeps what it learns: the data folder, and a temporary one where that cannot be written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fixer.base.errors import StoreError
from fixer.base.files import HOME_HINT, make_folder, store_error


@dataclass(frozen=True)
class DataFolder:
    """The names in the data folder.

    | name | what is in it |
    | --- | --- |
    | `artefacts/<card>/` | finished tunings: rows, times, noise, decision, and the environment they hold for |
    | `journal.sqlite` | every trial as it happens; a killed run goes on where it was |
    | `compiled.sqlite` | what compiling said for plans |
    | `reports/` | one page for each tuning, replaced when it is tuned again |
    | `bench/` | results of `moefix bench`, and its servers' logs |
    | `asked/`, `asking/` | names of files that SGLang asked for; what its classes answered when they were asked |
    | `downloads/` | which downloads are complete; may be deleted |
    | `run/`, `locks/` | each start's state; who measures on which card |
    | `written/` | names (hashes) of the tuning files that moefix wrote |
    | `overlay/` | a copy of SGLang's configuration folder, made of links, for a tree that cannot be written |
    | `cache/`, `kernels/`, `triton/` | fetched SGLang trees and compiler caches; may be deleted |

    Attributes:
        root: the folder itself.
    """

    root: Path

    @property
    def artefacts(self) -> Path:
        """Finished tunings, a folder for each card."""
        return self.root / "artefacts"

    @property
    def journal(self) -> Path:
        """Every trial (SQLite)."""
        return self.root / "journal.sqlite"

    @property
    def compiled(self) -> Path:
        """What compiling said (SQLite)."""
        return self.root / "compiled.sqlite"

    @property
    def reports(self) -> Path:
        """A page for each tuning."""
        return self.root / "reports"

    @property
    def bench(self) -> Path:
        """Results of `moefix bench`."""
        return self.root / "bench"

    @property
    def asked(self) -> Path:
        """Names that SGLang asked for."""
        return self.root / "asked"

    @property
    def asking(self) -> Path:
        """Answers of SGLang's own classes."""
        return self.root / "asking"

    @property
    def downloads(self) -> Path:
        """Which downloads are complete."""
        return self.root / "downloads"

    @property
    def run(self) -> Path:
        """The state of each start."""
        return self.root / "run"

    @property
    def locks(self) -> Path:
        """One lock for each kind of card."""
        return self.root / "locks"

    @property
    def written(self) -> Path:
        """Hashes of the tuning files that moefix wrote."""
        return self.root / "written"

    @property
    def overlay(self) -> Path:
        """Configuration folders for trees that cannot be written."""
        return self.root / "overlay"

    @property
    def cache(self) -> Path:
        """Fetched SGLang trees, what they declare, candidates' kernels; may be deleted."""
        return self.root / "cache"

    @property
    def kernels(self) -> Path:
        """Kernels cut out of SGLang's source; may be deleted."""
        return self.root / "kernels"

    @property
    def triton(self) -> Path:
        """Triton's cache for plans; may be deleted."""
        return self.root / "triton"


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
