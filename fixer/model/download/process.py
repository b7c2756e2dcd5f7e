"""A repository's download, in a process of its own, so that it can be ended at any moment and its memory goes with it.

What happens is written to standard output, one message a line. huggingface_hub's `snapshot_download` does the work; it
reads HF_ENDPOINT, HF_TOKEN, HF_HOME and its other variables itself. Here is decided what it fetches, whether the disk
has room for it, and what its exceptions mean. A file that came whole is kept; the client begins one that did not anew.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from fixer.base.errors import HubError, MoefixError, StoreError
from fixer.model.download.attempt import CHECK, ELSEWHERE, PART, Attempt
from fixer.model.download.messages import Done, Failed, Message, Request, Tell, Trouble, to_line
from fixer.model.hub import UnreachableError, hub_cache, refusal
from fixer.model.hub_answers import BusyError, check_answers

KEPT_HINT = "start again: the files that came whole are kept"

PAUSES = (2.0, 5.0, 15.0)
"""Seconds before each further attempt; one that brought a whole file starts the count anew."""

LONGEST_PAUSE = 3600.0
"""Seconds that a hub may ask to wait."""


# --- the process -----------------------------------------------------------------------------------------------------


def main() -> None:
    """The process's life: a request as JSON and the parent's process id as arguments, messages on standard output."""
    from fixer.machine.processes import die_with_parent

    request, parent = Request(**json.loads(sys.argv[1])), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    # Whatever a library prints goes nowhere; only messages go to the parent.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        lock = threading.Lock()

        def tell(message: Message) -> None:
            with lock:
                try:
                    out.write(to_line(message))
                    out.flush()
                except OSError:  # nobody reads any more
                    os._exit(1)

        tell(fetch(request, tell))
        os._exit(0)  # threads of the transfer may still be winding up


def _end(number: int, frame: FrameType | None) -> None:
    """The signal handler: end at once, and remove the parts of files that this process has open."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if PART.fullmatch(path.name):
                path.unlink()
    os._exit(128 + number)


def fetch(request: Request, tell: Tell) -> Done | Failed:
    """Fetch what the request names, trying again where that may help.

    Returns:
        Whether all is there. Never raises what can be foreseen.
    """
    check_answers()
    attempt = Attempt(request, tell)
    failures = 0
    while True:
        before = attempt.progress()
        try:
            return attempt.run()
        except Exception as error:  # the client's own, its transport's, or the file system's
            fault = fault_of(request, error, moved=attempt.progress() > before)
        if not isinstance(fault, UnreachableError):
            return Failed(fault.message, fault.hint, fault.exit_code, lasting=True)
        if attempt.has_weights():
            return Failed(fault.error.message, fault.error.hint, HubError.exit_code, lasting=False)
        failures = 0 if attempt.progress() > before else failures + 1
        asked = (isinstance(fault, BusyError) and fault.seconds) or 0.0
        if failures > len(PAUSES) or asked > LONGEST_PAUSE:
            hint = f"{fault.error.hint}; {KEPT_HINT}" if attempt.progress() else fault.error.hint
            return Failed(fault.error.message, hint, HubError.exit_code, lasting=False)
        pause = asked or PAUSES[max(0, failures - 1)]
        tell(Trouble(fault.error.message, pause))
        time.sleep(pause)


def fault_of(request: Request, error: BaseException, *, moved: bool) -> MoefixError | UnreachableError:
    """What an exception during a download means, without addresses or tokens.

    Args:
        request: what was to be fetched.
        error: the exception.
        moved: whether bytes came before it.
    """
    from huggingface_hub import errors

    if isinstance(error, (MoefixError, UnreachableError)):
        return error
    where = request.download_dir or hub_cache()
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if number in {errno.ENOSPC, errno.EDQUOT} or "os error 28" in str(each):
            return HubError(f"no space is left in {where} for {request.name}", f"free some there; {ELSEWHERE}")
        if number in {errno.EACCES, errno.EPERM, errno.EROFS} and isinstance(each, OSError) and each.filename:
            return StoreError(f"{where} cannot be written: {each.strerror}", f"give it to this user; {ELSEWHERE}")
    if not any(isinstance(each, OSError) or _is_the_clients(each) for each in _chain(error)):
        return HubError(f"the download of {request.name} failed: {type(error).__name__}", "give --moefix-skip-download")
    answered = any(getattr(each, "response", None) is not None for each in _chain(error))
    if moved and not answered and not isinstance(error, errors.LocalEntryNotFoundError):
        return UnreachableError(HubError(f"the connection to the hub broke off for {request.name}", CHECK))
    return refusal(request.name, request.revision, error)


def _is_the_clients(error: BaseException) -> bool:
    """Whether an exception is the client's, its transport's or hf_xet's (which raises RuntimeError)."""
    return isinstance(error, RuntimeError) or type(error).__module__.split(".")[0] in _CLIENTS


_CLIENTS = frozenset({"huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
