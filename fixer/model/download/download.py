"""The weights' download beside the tuning: what is to be fetched, the process that does it, and what its end means.

Tuning needs only config.json, so `serve` starts the download first and waits for it last. The process is
fixer/fetch.py; here a thread reads what it tells. A fault that no further attempt could cure ends the tuning at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Protocol

from fixer.base.data_folder import DataFolder
from fixer.base.errors import HubError, MoefixError, StoreError
from fixer.base.files import read_or_set_aside, safe_name, write_atomically
from fixer.base.json_reading import parse_json
from fixer.base.progress import Transfer, gigabytes, terminal_progress
from fixer.base.status import Phase, Share
from fixer.base.status_board import Board
from fixer.base.text import told
from fixer.machine.signals import ALARM
from fixer.model.config import Model, Source
from fixer.model.download import cached as cache
from fixer.model.download.messages import Bytes, Done, Failed, Message, Plan, Request, Trouble, from_line
from fixer.model.download.weights import FETCHED, Presence
from fixer.model.hub import hub_cache, is_commit, is_hub_id, uses_modelscope

if TYPE_CHECKING:
    from fixer.sglang.flags import ServerFlags


class Voice(Protocol):
    """What moefix says (fixer.base.voice.Voice)."""

    @property
    def quiet(self) -> bool:
        """Whether only warnings are said."""

    def line(self, text: str) -> None:
        """Something that is good to know."""

    def warning(self, text: str) -> None:
        """Something that must be known."""


# --- what is to be fetched -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """No download, and why; `commit` where it is known."""

    why: str = ""
    commit: str = ""


def wanted(model: Model, flags: ServerFlags, home: Path, environ: Mapping[str, str] = os.environ) -> Request | Nothing:
    """What `serve` is to fetch for a model. Asks no hub.

    Raises:
        HubError: the hub may not be asked, and the cache has not all of the weights.
    """
    why_not = _why_not(model, flags, environ)
    if why_not is not None:
        return Nothing(why_not)
    from huggingface_hub import constants

    commit = model.revision if is_commit(model.revision) else None
    if constants.HF_HUB_OFFLINE:
        return _offline(model.name, flags)
    if commit is not None and is_recorded(home, model.name, commit, flags):
        return Nothing(f"the weights are in the cache, commit {commit}: nothing to fetch", commit)
    if model.from_cache:
        there, found = cached(model.name, commit or flags.revision, flags)
        if found is Presence.COMPLETE:
            return Nothing(f"the hub is out of reach, and the weights are in the cache, commit {there}", there or "")
    return Request(
        model.name, flags.revision, commit, flags.load_format, flags.download_dir, code=flags.trust_remote_code
    )


def _why_not(model: Model, flags: ServerFlags, environ: Mapping[str, str]) -> str | None:
    """Why moefix fetches nothing, "" where that goes without saying; None where it does."""
    if model.source is Source.FOLDER:
        return ""
    if uses_modelscope(environ):
        return "SGLANG_USE_MODELSCOPE is set: SGLang downloads the weights itself, from ModelScope"
    if flags.load_format == "dummy":
        return "load format dummy: no weights are fetched"
    if flags.load_format not in FETCHED:
        return f"weights of load format {flags.load_format} are left to SGLang"
    return None if is_hub_id(model.name) else f"{model.name} is no name on a hub: its weights are left to SGLang"


def _offline(name: str, flags: ServerFlags) -> Nothing:
    commit, found = cached(name, flags.revision, flags)
    if found is Presence.INCOMPLETE:
        where = flags.download_dir or hub_cache()
        raise HubError(
            f"HF_HUB_OFFLINE is set, and the cache in {where} has not all weights of {name}",
            "unset HF_HUB_OFFLINE, or mount the cache that has them and set HF_HOME to it",
        )
    return Nothing(f"HF_HUB_OFFLINE is set: serving from the cache, commit {commit}", commit or "")


def cached(name: str, revision: str | None, flags: ServerFlags) -> tuple[str | None, Presence]:
    """The commit that the caches have for a revision, and whether its weights are there."""
    return cache.cached(name, revision, flags.load_format, flags.download_dir)


# --- what was fetched ------------------------------------------------------------------------------------------------


def _record_path(home: Path, name: str, commit: str) -> Path:
    return DataFolder(home).downloads / f"{safe_name(name.replace('/', '--'))}@{commit[:16]}.json"


def _settings(flags: ServerFlags) -> dict[str, str | bool | None]:
    return {
        "revision": flags.revision,
        "load_format": flags.load_format,
        "download_dir": flags.download_dir,
        "code": flags.trust_remote_code,
        "cache": str(hub_cache()),
    }


def is_recorded(home: Path, name: str, commit: str, flags: ServerFlags) -> bool:
    """Whether an earlier download of just this came to its end, and all of its files are still there."""
    path = _record_path(home, name, commit)
    if not path.exists():
        return False
    record, _ = read_or_set_aside(path, _read_record)
    return record is not None and record[0] == _settings(flags) and all(os.path.exists(file) for file in record[1])


def _read_record(content: bytes) -> tuple[dict[str, str | bool | None], list[str]]:
    row = parse_json(content)
    if not isinstance(row, dict) or set(row) != {"settings", "files"}:
        raise ValueError("it is no record of a download")
    settings, files = row["settings"], row["files"]
    is_list = isinstance(files, list) and all(isinstance(file, str) and "\0" not in file for file in files)
    if not isinstance(settings, dict) or not is_list:
        raise ValueError("it is no record of a download")
    return settings, files


def _record(home: Path, name: str, done: Done, flags: ServerFlags) -> None:
    content = json.dumps({"settings": _settings(flags), "files": done.files}, indent=1) + "\n"
    with suppress(StoreError):  # then the hub is asked once more the next time
        write_atomically(_record_path(home, name, done.commit), content.encode())


# --- beside the tuning -----------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """Raised in the main thread, through whatever it does: the download can never succeed."""


@contextmanager
def downloading(
    model: Model, flags: ServerFlags, home: Path, say: Voice, board: Board | None = None, *, skip: bool = False
) -> Iterator[Download]:
    """Have a model's weights fetched while the body runs; the body's end, by whatever, is the end of the download.

    Must be entered in the main thread.

    Args:
        model, flags: what SGLang will load.
        home: the data folder.
        say: where lines go.
        board: told how far it is.
        skip: fetch nothing.

    Yields:
        The download; `wait` before the weights are needed.

    Raises:
        HubError, StoreError: the weights cannot be had; also in the middle of the body.
    """
    plan = Nothing() if skip else wanted(model, flags, home)
    if flags.speculative_draft_model_path:
        say.line(f"the draft model {flags.speculative_draft_model_path} is left to SGLang")
    download = Download(plan, flags, home, say, board)
    before = signal.signal(ALARM, download.on_alarm)
    try:
        try:
            download.start()
            yield download
        finally:
            signal.signal(ALARM, signal.SIG_IGN)
    except _Ended:
        raise download.fault() from None
    finally:
        signal.signal(ALARM, signal.SIG_IGN)
        download.close()
        signal.signal(ALARM, before)


class Download:
    """A download under way.

    Args:
        plan: what is to be fetched.
        flags, home, say, board: as for `downloading`.
    """

    def __init__(
        self, plan: Request | Nothing, flags: ServerFlags, home: Path, say: Voice, board: Board | None = None
    ) -> None:
        self._plan, self._flags, self._home, self._say, self._board = plan, flags, home, say, board
        self._process: subprocess.Popen[str] | None = None
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()
        self._failed: Failed | None = None
        self._shown = Transfer("download", quiet=say.quiet)

    def start(self) -> None:
        """Start the process, where there is something to fetch."""
        if isinstance(self._plan, Nothing):
            if self._plan.why:
                self._say.line(self._plan.why)
            self._note(revision=self._plan.commit)
            self._over.set()
            return
        program = "import sys; sys.path[:0] = [sys.argv.pop()]; from fixer.model.download.process import main; main()"
        package = str(Path(__file__).resolve().parents[3])
        command = [sys.executable, "-c", program, json.dumps(asdict(self._plan)), str(os.getpid()), package]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the client's own words, which may hold addresses
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        self._watcher = threading.Thread(target=self._watch, name="moefix-download", daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Wait until all is there.

        Raises:
            HubError, StoreError: the weights cannot be had.
        """
        if not self._over.is_set():
            self._note(phase=Phase.DOWNLOADING, detail="")
            with terminal_progress(quiet=self._say.quiet):
                self._over.wait()
        if self._watcher is not None:
            self._watcher.join()  # with its alarm, so that none comes later
        if self._failed is None:
            return
        if not self._has_weights():
            raise self.fault()
        fault = self.fault()
        self._say.warning(f"{fault.message}; the cache has all weights, and SGLang serves from it")

    def fault(self) -> MoefixError:
        """Why there is no download."""
        if self._failed is None:
            return HubError("the download ended", "start again: the files that came whole are kept")
        kind = StoreError if self._failed.exit_code == StoreError.exit_code else HubError
        return kind(self._failed.message, self._failed.hint)

    def close(self) -> None:
        """End the process now; files that came whole are kept."""
        if self._process is not None:
            self._process.terminate()  # it removes the parts of files that nobody would use again
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        if self._watcher is not None:
            self._watcher.join(5)

    def on_alarm(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: ends whatever the main thread does.

        Raises:
            _Ended: always, where the download has failed for good.
        """
        if self._failed is not None:
            _raise_ended()

    def _has_weights(self) -> bool:
        assert isinstance(self._plan, Request)
        return cached(self._plan.name, self._plan.commit or self._plan.revision, self._flags)[1] is Presence.COMPLETE

    def _note(self, **changes: object) -> None:
        if self._board is not None:
            self._board.update(**changes)

    # The watching thread.

    def _watch(self) -> None:
        try:
            self._follow()
        except Exception as error:  # whatever it is, the main thread must not wait for ever
            self._failed = Failed(
                f"the download could not be followed: {told(error)}",
                "start again: the files that came whole are kept",
                HubError.exit_code,
                lasting=False,
            )
        finally:
            self._over.set()
        if self._failed is not None and self._failed.lasting and not self._has_weights():
            # A signal of its own, so that the main thread wakes up whatever it waits for.
            signal.pthread_kill(threading.main_thread().ident or 0, ALARM)

    def _follow(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        is_done = False
        for line in process.stdout:
            message = from_line(line)
            is_done = is_done or isinstance(message, Done)
            self._hear(message)
        code = process.wait()
        if not is_done and self._failed is None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._failed = Failed(
                f"the downloading process ended with {how}",
                "start again: the files that came whole are kept; is the machine short of memory?",
                HubError.exit_code,
                lasting=False,
            )

    def _hear(self, message: Message | None) -> None:
        match message:
            case Plan():
                there = f", {gigabytes(message.done)} of it there already" if message.done else ""
                name = self._plan.name if isinstance(self._plan, Request) else ""
                size = f"{message.files} files, {gigabytes(message.total)}{there}"
                self._say.line(f"downloading {name} at commit {message.commit} ({size}) into {message.folder}")
                self._note(revision=message.commit)
                self._tell(message.done, message.total)
            case Bytes():
                self._tell(message.done, message.total)
            case Trouble():
                again = f"; trying again in {message.seconds:.0f} s" if message.seconds else ""
                self._say.line(f"download: {message.what}{again}")
            case Done():
                self._say.line(f"the download is complete, commit {message.commit}")
                assert isinstance(self._plan, Request)
                _record(self._home, self._plan.name, message, self._flags)
            case Failed():
                self._failed = message

    def _tell(self, done: int, total: int) -> None:
        self._shown.update(done, total)
        self._note(download=Share(done, total, "bytes"))


def _raise_ended() -> NoReturn:
    raise _Ended
